"""``FederatedArguments``: what travels, and what the server makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...comm.codecs import Codec, codec_names
from ..errors import ArgumentsError

# On a command line a codec has a name; HfArgumentParser reads one type an argument.
if TYPE_CHECKING:
    CodecOrName = Codec | str
else:
    CodecOrName = str


@dataclass
class ServerArguments:
    """What travels, and what the server makes of it."""

    uplink_codec: CodecOrName = field(
        default="identity",
        metadata={
            "help": f"How updates travel: {', '.join(codec_names())}, or several joined by '+', "
            "such as topk:0.1+int8; in Python also a Codec."
        },
    )
    downlink_codec: CodecOrName = field(
        default="identity", metadata={"help": "How the global state travels; likewise, but topk."}
    )
    error_feedback: bool = field(
        default=False, metadata={"help": "Send what a codec lost the last time along."}
    )
    max_update_norm: float | None = field(
        default=None,
        metadata={
            "help": "Refuse an update whose norm is larger, or that of what the strategy sends "
            "beside it."
        },
    )
    clip_update_norm: float | None = field(
        default=None, metadata={"help": "Scale an update down to this norm if it is larger."}
    )
    clip_target_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Let the clipping norm, clip_update_norm at first, follow the updates: so that "
            "this share of them is not clipped (0.5: half)."
        },
    )
    clip_learning_rate: float = field(
        default=0.2, metadata={"help": "How fast the clipping norm follows, in its logarithm."}
    )
    clip_count_std: float | None = field(
        default=None,
        metadata={
            "help": "With noise, standard deviation of that on the count of updates that are not "
            "clipped; by default a twentieth of the cohort."
        },
    )
    aggregation: str = field(
        default="mean",
        metadata={"help": "mean, median, or trimmed_mean:SHARE of the cohort cut at either end."},
    )
    client_weighting: str = field(
        default="examples",
        metadata={
            "help": "What a client weighs in the mean: examples: its rows; tokens: what its losses "
            "in the round were means of (labels that count, or what compute_loss returns as its "
            "third value); uniform: all alike.",
            "choices": ["examples", "tokens", "uniform"],
        },
    )
    exact_average: bool = field(
        default=False,
        metadata={
            "help": "Make the global weights the mean of the clients' weights, while all factors "
            "train: what the factors' mean misses goes into a dense remainder of every weight."
        },
    )
    quorum: float | None = field(
        default=None,
        metadata={
            "help": "Share of the cohort whose updates must be usable, in [0, 1]; by default one "
            "update must be, of those that were sent. 0: a round of which nothing can be used "
            "changes nothing, and the run goes on."
        },
    )
    on_client_error: str = field(
        default="refuse",
        metadata={
            "help": "What an exception in a client's own training does: refuse (the round goes on "
            "without the client, and the quorum decides) or raise.",
            "choices": ["refuse", "raise"],
        },
    )
    dp_noise_multiplier: float = field(
        default=0.0,
        metadata={"help": "Gaussian noise on the sum of updates, in units of clip_update_norm."},
    )
    dp_mode: str = field(
        default="central",
        metadata={
            "help": "Who adds the noise: central: the server, to the sum; distributed: each client "
            "a share of it, under secure_aggregation, so that the server sees no sum without; "
            "local: each client all of it, to its own update.",
            "choices": ["central", "distributed", "local"],
        },
    )
    dp_noise_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the noise, for tests; by default a secret one, which only the "
            "checkpoints hold."
        },
    )
    dp_delta: float = field(default=1e-5, metadata={"help": "δ of the reported (ε, δ)."})
    dp_accountant: str = field(
        default="rdp",
        metadata={
            "help": "What counts ε: rdp (Rényi), or pld (privacy loss distributions), which is "
            "tight and needs client_sampling='poisson'.",
            "choices": ["rdp", "pld"],
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed that all randomness derives from."})


def require_bounded(args: ServerArguments) -> None:
    """Raise unless noise for privacy protects what is sent.

    Raises:
        ArgumentsError: it would not, or ``dp_mode`` says nothing.
    """
    if not args.dp_noise_multiplier:
        if args.dp_mode != "central":
            raise ArgumentsError(
                f"dp_mode={args.dp_mode!r} does nothing without dp_noise_multiplier: no noise is "
                "added; give both, or neither"
            )
        return
    if args.clip_update_norm is None:
        raise ArgumentsError(
            "dp_noise_multiplier needs clip_update_norm: noise protects only what is bounded"
        )
    if args.dp_mode != "local" and args.aggregation != "mean":
        raise ArgumentsError(
            f"dp_noise_multiplier needs aggregation='mean', got {args.aggregation!r}; with "
            "dp_mode='local' it may be any"
        )
    if args.dp_mode != "central" and args.clip_target_quantile is not None:
        raise ArgumentsError(
            f"clip_target_quantile cannot have dp_mode={args.dp_mode!r}: clients would tell who "
            "was clipped, and that count has no noise; use a fixed clip_update_norm"
        )
