"""Which runs a secure sum suits, and what its ends agree on in a round."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...comm.errors import SecureAggregationError
from ...comm.schema import Schema, digest
from ...comm.secure.agreement import Agreement
from ...comm.secure.primitives import require_library
from ...comm.secure.quantize import FixedRange
from ..arguments import FederatedArguments
from ..errors import ArgumentsError
from ..strategies import Strategy

#: Multiples of σ that a sum's noise never has (chance 10⁻³² a value): on them its words rest.
_SURELY = 12.0
#: σ of a client from which the sum of discrete Gaussians is one up to 10 t e^(-π² σ²) < 10⁻⁶³ t
#: (Kairouz, Liu and Steinke, ICML 2021, arXiv:2102.06387, theorem 1).
_FINE = 4.0


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
    how, n = fixed_range(args), len(cohort)
    numel = sum(entry.numel for entry in schema.values())
    threshold = n - int(args.secure_drop_outs * n + 1e-9)
    std = noise_std(args, threshold, numel)
    return Agreement(
        round=round,
        clients=tuple(cohort),
        threshold=threshold,
        numel=numel,
        levels=how.levels,
        largest_weight=largest_weight(args, strategy),
        context=f"{digest(schema)} {how.clip!r}".encode(),
        noise=math.ceil(_SURELY * std * math.sqrt(n)),
    )


def noise_std(args: FederatedArguments, threshold: int, numel: int) -> float:
    """σ of a client's own noise in steps of the grid, with ``dp_mode="distributed"``; else 0.

        σ = z (s C / c + √d) / √t

    so that the noise of t clients together has z times the norm of an update of d values on the
    grid, to which rounding adds less than 1 a value, and so less than √d.

    Args:
        args: the run's settings.
        threshold: t.
        numel: d.

    Raises:
        SecureAggregationError: the grid is too coarse for it.
    """
    if args.noise_mode != "distributed":
        return 0.0
    how, clip = fixed_range(args), args.clip_update_norm
    assert clip is not None
    std = args.dp_noise_multiplier * (how.levels * clip / how.clip + math.sqrt(numel))
    std /= math.sqrt(threshold)
    if std < _FINE:
        raise SecureAggregationError(
            f"a client's noise has σ = {std:.2g} steps of the grid, and sums of discrete Gaussians "
            f"are one from {_FINE:g} on: raise secure_bits, or lower secure_clip"
        )
    return std


def require_possible(
    args: FederatedArguments,
    strategy: Strategy,
    cohort_size: int | None,
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
        cohort_size: clients of a round; None on a node, which learns it round by round.
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
        "dp_noise_multiplier with dp_mode='central': the server would see the sum without noise; "
        "use dp_mode='distributed'": args.noise_mode == "central",
        "dp_mode='local': each client's noise would be as large as without; use "
        "dp_mode='distributed'": args.noise_mode == "local",
        f"secure_max_examples={args.secure_max_examples} with dp_noise_multiplier: clients count "
        "alike": bool(args.noise_mode) and args.secure_max_examples > 1,
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
        if cohort_size is not None:
            agreement_of(args, strategy, 0, range(cohort_size), schema)
    except SecureAggregationError as error:
        raise ArgumentsError(f"secure_aggregation is not possible: {error}") from None
