"""Which runs a secure sum suits, and what its ends agree on in a round."""

from __future__ import annotations

from collections.abc import Sequence

from ...comm.errors import SecureAggregationError
from ...comm.schema import Schema, digest
from ...comm.secure.agreement import Agreement
from ...comm.secure.primitives import require_library
from ...comm.secure.quantize import FixedRange
from ..arguments import FederatedArguments
from ..errors import ArgumentsError
from ..strategies import Strategy


def fixed_range(args: FederatedArguments) -> FixedRange:
    """How updates become integers."""
    clip = args.clip_update_norm if args.secure_clip is None else args.secure_clip
    assert clip is not None
    return FixedRange(clip, args.secure_bits)


def largest_weight(args: FederatedArguments, strategy: Strategy) -> int:
    """What a client may weigh in the sum; 1: all alike."""
    uniform = strategy.weighting == "uniform" or args.client_sampling == "weighted"
    uniform |= args.client_weighting == "uniform"
    return 1 if uniform else args.secure_max_examples


def agreement_of(
    args: FederatedArguments,
    strategy: Strategy,
    round: int,
    cohort: Sequence[int],
    schema: Schema,
) -> Agreement:
    """What both ends know of a round's sum.

    Args:
        args: the run's settings.
        strategy: the federated optimizer.
        round: rounds completed.
        cohort: the sampled clients.
        schema: of the updates.

    Raises:
        SecureAggregationError: no sum could be made so.
    """
    how = fixed_range(args)
    return Agreement(
        round=round,
        clients=tuple(cohort),
        threshold=len(cohort) - int(args.secure_drop_outs * len(cohort) + 1e-9),
        numel=sum(entry.numel for entry in schema.values()),
        levels=how.levels,
        largest_weight=largest_weight(args, strategy),
        context=f"{digest(schema)} {how.clip!r}".encode(),
    )


def require_possible(
    args: FederatedArguments,
    strategy: Strategy,
    cohort_size: int,
    schema: Schema,
    buffers: Sequence[str] = (),
    *,
    ranks: bool = False,
    processes: int = 1,
) -> None:
    """Raise unless a run can have secure aggregation.

    Args:
        args: the run's settings.
        strategy: the federated optimizer.
        cohort_size: clients of a round.
        schema: of the updates.
        buffers: that would travel.
        ranks: whether clients have ranks of their own.
        processes: that run it together.

    Raises:
        ArgumentsError: it cannot.
    """
    name = type(strategy).__name__
    whole = [n for n, entry in schema.items() if not entry.is_float]
    obstacles = {
        f"aggregation={args.aggregation!r}: it sees single updates": args.aggregation != "mean",
        f"{name}: it sees single updates": strategy.sees_updates,
        f"{name}: what it sends beside the update has no range that was agreed on": (
            bool(strategy.uplink)
        ),
        f"{name}: nothing is sent, so there is no sum": not strategy.communicates,
        f"uplink_codec={str(args.uplink_codec)!r}: sums need integers of one range, of "
        "secure_bits=8, 16 or 32 bits": str(args.uplink_codec) != "identity",
        "error_feedback: rounding to integers is unbiased and keeps no residual": (
            args.error_feedback
        ),
        "dp_noise_multiplier: rounding may lift an update's norm over clip_update_norm, which ε "
        "counts on": bool(args.dp_noise_multiplier),
        "report_averaging_bias: it sees single updates": args.report_averaging_bias,
        "client_ranks: each part would be a sum over another cohort, of one client perhaps": ranks,
        "client_sampling='poisson': its threshold is of a cohort whose size is agreed on": (
            args.client_sampling == "poisson"
        ),
        f"{processes} processes: run it in one": processes > 1,
        f"buffers, first {list(buffers)[:2]}: their range is unknown, so use group norm, or keep "
        "them with each client by local_modules": bool(buffers),
        f"{whole[:2]}: they are not real floating-point numbers": bool(whole),
    }
    if found := next((text for text, holds in obstacles.items() if holds), None):
        raise ArgumentsError(f"secure_aggregation cannot have {found}")
    try:
        require_library()
        agreement_of(args, strategy, 0, range(cohort_size), schema)
    except SecureAggregationError as error:
        raise ArgumentsError(f"secure_aggregation is not possible: {error}") from None


def require_plain(args: FederatedArguments, where: str) -> None:
    """Raise where messages of secure aggregation have no way yet.

    Raises:
        ArgumentsError: it is asked for.
    """
    if args.secure_aggregation:
        raise ArgumentsError(
            f"secure_aggregation has no way through {where} yet: simulate it with "
            "FederatedTrainer, or leave it out; without it the server sees single updates"
        )
