"""What a run whose clients may be late can have."""

from __future__ import annotations

from ..arguments import FederatedArguments
from ..errors import ArgumentsError
from ..strategies import Strategy


def require_late_possible(strategy: Strategy, args: FederatedArguments) -> None:
    """Raise unless the run is right where updates may be older than the server.

    Raises:
        ArgumentsError: it asks for such rounds and has something else that they make wrong.
    """
    if args.buffer_size is None:
        return
    found = ""
    if not strategy.updates_may_be_late:
        found = (
            f"{type(strategy).__name__}: it does not say that its algebra holds for updates that "
            "are older than the server (class attribute updates_may_be_late)"
        )
    elif args.noise_mode not in ("", "local"):
        found = (
            "dp_noise_multiplier: its ε counts on a cohort drawn alike from all clients in every "
            "round, and here speed decides who reports"
        )
    elif args.secure_aggregation:
        found = "secure_aggregation: a sum is of clients that begin and end together"
    elif args.client_sampling == "poisson":
        found = "client_sampling='poisson': who begins depends on who is at work"
    elif args.factor_schedule != "all":
        found = (
            f"factor_schedule={args.factor_schedule!r}: a late update is of the factors whose turn "
            "it was when it began"
        )
    elif args.report_averaging_bias:
        found = "report_averaging_bias: late updates do not begin where the round does"
    if found:
        raise ArgumentsError(f"buffer_size cannot have {found}; change that, or leave it out")
