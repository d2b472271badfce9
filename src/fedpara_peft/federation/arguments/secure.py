"""``FederatedArguments``: whether the server sees single updates, or their sum alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ArgumentsError


@dataclass
class SecureArguments:
    """Whether the server sees single updates, or their sum alone."""

    secure_aggregation: bool = field(
        default=False,
        metadata={"help": "Let the server see the sum of a round's updates and no single one."},
    )
    secure_clip: float | None = field(
        default=None,
        metadata={
            "help": "Clamp every entry of an update to this, either sign, before it is rounded to "
            "an integer; clip_update_norm by default."
        },
    )
    secure_bits: int = field(
        default=16,
        metadata={"help": "Bits of a client's integers: 8, 16 or 32.", "choices": [8, 16, 32]},
    )
    secure_max_examples: int = field(
        default=1,
        metadata={
            "help": "A client counts by its examples, at most so many; 1: all alike. Every "
            "doubling costs a bit a value."
        },
    )
    secure_drop_outs: float = field(
        default=0.3,
        metadata={
            "help": "Share of the cohort that may drop out, before or after it sent masked "
            "updates, in [0, 0.5); with more the round stops."
        },
    )
    unmask_drop_out_probability: float = field(
        default=0.0,
        metadata={
            "help": "Chance that a client whose masked update has come does not help to unmask, in "
            "a simulation, in [0, 1)."
        },
    )


def require_meaning(
    args: SecureArguments, clip_update_norm: float | None, noise_mode: str = ""
) -> None:
    """Raise where an argument would do nothing, or lacks another.

    Raises:
        ArgumentsError: so it is.
    """
    if args.secure_aggregation and args.secure_clip is None and clip_update_norm is None:
        raise ArgumentsError(
            "secure_aggregation needs secure_clip: clients round their updates to integers of one "
            "range, which none of them may tell; give the largest entry that you expect"
        )
    if noise_mode == "distributed" and not args.secure_aggregation:
        raise ArgumentsError(
            "dp_mode='distributed' needs secure_aggregation=True: a client's share of the noise "
            "protects the sum, and no single update; or use dp_mode='local'"
        )
    if args.secure_clip is not None and not args.secure_aggregation:
        raise ArgumentsError(
            "secure_clip does nothing without secure_aggregation=True: the server would see single "
            "updates; give both, or neither"
        )
