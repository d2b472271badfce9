"""``FederatedArguments``: the settings of a federated run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ...comm.codecs import Codec, codec_names
from ..errors import ArgumentsError
from .checks import as_annotated, as_options, lies_in
from .schedule import SCHEDULES, share_of_rate

# On a command line a codec has a name; HfArgumentParser reads one type an argument.
if TYPE_CHECKING:
    CodecOrName = Codec | str
else:
    CodecOrName = str

#: By interval as mathematicians write it, the arguments that lie in it (or are None).
_INTERVALS = {
    "[0, ∞)": ("num_rounds", "eval_every", "save_every", "weight_decay", "composed_weight_decay",
               "jacobian_correction", "dp_noise_multiplier", "seed", "warmup_rounds"),
    "[1, ∞)": ("num_local_epochs", "per_client_batch_size", "gradient_accumulation_steps",
               "eval_batch_size", "save_total_limit", "clients_per_round"),
    # A rate or a decay of 0 would freeze the model from the second round on, without a sign of it.
    "(0, ∞)": ("learning_rate", "factor_learning_rate", "learning_rate_decay", "max_grad_norm",
               "max_update_norm", "clip_update_norm"),
    "(0, 1]": ("client_fraction",),
    "[0, 1]": ("quorum",),
    "[0, 1)": ("drop_out_probability", "momentum", "warmup_ratio"),
    "(0, 1)": ("dp_delta",),
}  # fmt: skip
_CODECS = ("uplink_codec", "downlink_codec")
#: What None means, where it is more than «the default».
_NONE = {
    "max_update_norm": "None: unlimited",
    "clip_update_norm": "None: unlimited",
    "max_grad_norm": "None does not clip",
    "save_total_limit": "None keeps all",
    "learning_rate_decay": "1 keeps the learning rate",
    "factor_learning_rate": "None: learning_rate",
}
#: What the optimizer's options are called here, for all optimizers.
_OWN_OPTIONS = {"lr": "learning_rate", "weight_decay": "weight_decay", "momentum": "momentum"}


@dataclass
class FederatedArguments:
    """Settings of a federated run; ``HfArgumentParser`` reads them from a command line.

    Raises:
        ArgumentsError: an argument has a value, or meets another, that it cannot have.
    """

    output_dir: str = field(metadata={"help": "Folder for checkpoints, history and trackers."})
    num_rounds: int = field(default=100, metadata={"help": "Rounds T."})
    client_fraction: float | None = field(
        default=None, metadata={"help": "Share of the clients sampled each round, in (0, 1]."}
    )
    clients_per_round: int | None = field(
        default=None, metadata={"help": "Number of clients sampled each round."}
    )
    client_sampling: str = field(
        default="uniform",
        metadata={
            "help": "uniform, or weighted: drawn in proportion to their examples, then averaged "
            "alike.",
            "choices": ["uniform", "weighted"],
        },
    )
    drop_out_probability: float = field(
        default=0.0, metadata={"help": "Chance that a sampled client does not report, in [0, 1)."}
    )
    local_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that stay with each client (FedPer)."}
    )
    num_local_epochs: int = field(default=1, metadata={"help": "Epochs E a client trains."})
    per_client_batch_size: int = field(default=32, metadata={"help": "Examples per local step."})
    drop_last: bool = field(
        default=False,
        metadata={
            "help": "Leave out a last training batch that is not full, unless it is the only one; "
            "otherwise a last row alone joins the batch before it where there is batch norm."
        },
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Batches per local step; their gradients are averaged over rows, or over the "
            "tokens that count."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the labels; by default the only one that is called labels, label, "
            "y, target, class or the like."
        },
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "no, fp16 or bf16; Accelerate's setting by default.",
            "choices": ["no", "fp16", "bf16"],
        },
    )
    optim: str = field(
        default="sgd",
        metadata={
            "help": "Clients' optimizer: sgd, adamw, adam, adafactor, muon or another of "
            "torch.optim, in any case."
        },
    )
    optim_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More of its options, as a mapping or as text such as "
            "'betas=(0.9, 0.95), eps=1e-6' or JSON."
        },
    )
    optimizer_state: str = field(
        default="reset",
        metadata={
            "help": "reset: a client's optimizer starts anew in every round; keep: the client "
            "keeps its state (moments) and never sends it.",
            "choices": ["reset", "keep"],
        },
    )
    learning_rate: float = field(
        default=0.1, metadata={"help": "Clients' learning rate; the default suits sgd alone."}
    )
    factor_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of FedPara's factors; that of all the rest by default."},
    )
    learning_rate_decay: float = field(
        default=1.0,
        metadata={
            "help": "Factor on the learning rates after every round, beside lr_scheduler_type."
        },
    )
    lr_scheduler_type: str = field(
        default="constant",
        metadata={
            "help": "Course of the learning rates over the rounds after the warm-up: constant, "
            "linear or cosine (to nothing after num_rounds).",
            "choices": list(SCHEDULES),
        },
    )
    warmup_rounds: int = field(
        default=0, metadata={"help": "Rounds in which the learning rates rise to their value."}
    )
    warmup_ratio: float = field(
        default=0.0, metadata={"help": "The same as a share of num_rounds, in [0, 1)."}
    )
    momentum: float = field(
        default=0.0, metadata={"help": "Momentum of sgd and what else has it; 0: its default."}
    )
    weight_decay: float = field(
        default=0.0,
        metadata={"help": "Weight decay, as the optimizer means it: adamw's is decoupled."},
    )
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip the gradient's norm to this; None does not clip."}
    )
    jacobian_correction: float = field(
        default=0.0, metadata={"help": "Strength of the Jacobian correction; 0: off."}
    )
    composed_weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of the composed weights, in the loss; 0: off."}
    )
    factor_schedule: str = field(
        default="all",
        metadata={
            "help": "all, or one_block: one factor block a round, whose average is exact (not "
            "with tanh).",
            "choices": ["all", "one_block"],
        },
    )
    report_averaging_bias: bool = field(
        default=False,
        metadata={"help": "Measure the error of averaging factors instead of weights."},
    )
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
    aggregation: str = field(
        default="mean",
        metadata={"help": "mean, median, or trimmed_mean:SHARE of the cohort cut at either end."},
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
    dp_noise_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the noise, for tests; by default a secret one, which only the "
            "checkpoints hold."
        },
    )
    dp_delta: float = field(default=1e-5, metadata={"help": "δ of the reported (ε, δ)."})
    seed: int = field(default=0, metadata={"help": "Seed that all randomness derives from."})
    engine: str = field(
        default="auto",
        metadata={
            "help": "sequential: one client after the other; batched: clients with equally many "
            "examples side by side, the same up to rounding; auto: batched where it is known to "
            "pay, in one process.",
            "choices": ["auto", "sequential", "batched"],
        },
    )
    eval_every: int = field(
        default=1, metadata={"help": "Evaluate every so many rounds and after the last; 0: never."}
    )
    eval_batch_size: int = field(default=256, metadata={"help": "Examples per evaluation step."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start afresh in a folder that holds another run, and remove that one."},
    )
    save_every: int = field(
        default=0, metadata={"help": "Write a checkpoint every so many rounds; 0: never."}
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints to keep; all by default."}
    )
    client_store: str = field(
        default="auto",
        metadata={
            "help": "Where clients' states rest: memory, disk, or auto (memory for one process).",
            "choices": ["auto", "memory", "disk"],
        },
    )
    report_to: list[str] | None = field(
        default=None,
        metadata={"help": "Accelerate trackers, such as tensorboard or wandb; none: no tracker."},
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bar."})

    def __post_init__(self) -> None:
        self.optim_args = options = as_options("optim_args", self.optim_args)
        as_annotated(self, dict.fromkeys(_CODECS, Codec))
        for interval, names in _INTERVALS.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not lies_in(value, interval):
                    hint = f"; {_NONE[name]}" if name in _NONE else ""
                    raise ArgumentsError(f"{name} must be in {interval}, got {value}{hint}")
        for entry in fields(self):
            value, choices = getattr(self, entry.name), entry.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ArgumentsError(f"{entry.name} must be one of {choices}, got {value!r}")
        if self.client_fraction is not None and self.clients_per_round is not None:
            raise ArgumentsError("give client_fraction or clients_per_round, not both")
        if self.dp_noise_multiplier and self.clip_update_norm is None:
            raise ArgumentsError(
                "dp_noise_multiplier needs clip_update_norm: noise protects only what is bounded"
            )
        if self.dp_noise_multiplier and self.aggregation != "mean":
            raise ArgumentsError(
                f"dp_noise_multiplier needs aggregation='mean', got {self.aggregation!r}"
            )

        for option in (options or {}).keys() & _OWN_OPTIONS.keys():
            raise ArgumentsError(
                f"optim_args has {option!r}: give it as {_OWN_OPTIONS[option]}, which all "
                "optimizers share"
            )
        if self.warmup_rounds and self.warmup_ratio:
            raise ArgumentsError("give warmup_rounds or warmup_ratio, not both")
        if self.lr_scheduler_type != "constant" and 0 < self.num_rounds <= self._warmup:
            raise ArgumentsError(
                f"warmup_rounds={self.warmup_rounds} leaves nothing of num_rounds="
                f"{self.num_rounds} for lr_scheduler_type={self.lr_scheduler_type!r}: lower it"
            )

    def described(self) -> dict[str, Any]:
        """All settings as JSON has them: a codec by its text."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {n: str(v) if isinstance(v, Codec) else v for n, v in values.items()}

    def cohort_size(self, population: int) -> int:
        """Clients sampled each round: at least one, all of them by default."""
        if self.clients_per_round is not None:
            if self.clients_per_round > population:
                raise ArgumentsError(
                    f"clients_per_round={self.clients_per_round}, but there are only {population} "
                    "clients"
                )
            return self.clients_per_round
        return max(1, round((self.client_fraction or 1.0) * population))

    def learning_rate_at(self, round: int, *, factors: bool = False) -> float:
        """Clients' learning rate in a round, counted from 0.

        Args:
            round: rounds completed.
            factors: that of FedPara's factors.
        """
        own = self.factor_learning_rate if factors else None
        rate = self.learning_rate if own is None else own
        share = share_of_rate(self.lr_scheduler_type, round, self._warmup, self.num_rounds)
        return rate * self.learning_rate_decay**round * share

    @property
    def schedule_rounds(self) -> int | None:
        """``num_rounds`` where rates depend on it, so that a resumed run may not change it."""
        fixed = self.lr_scheduler_type == "constant" and not self.warmup_ratio
        return None if fixed else self.num_rounds

    @property
    def _warmup(self) -> int:
        return self.warmup_rounds or math.ceil(self.warmup_ratio * self.num_rounds)
