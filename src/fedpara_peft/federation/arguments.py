"""``FederatedArguments``: the settings of a federated run."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ArgumentsError

_CHOICES = {
    "client_sampling": ("uniform", "weighted"),
    "factor_schedule": ("all", "one_block"),
    "client_store": ("auto", "memory", "disk"),
    "engine": ("auto", "sequential", "batched"),
    "mixed_precision": (None, "no", "fp16", "bf16"),
}


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
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches per local step; their gradients are averaged."}
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no, fp16 or bf16; Accelerate's setting by default."},
    )
    learning_rate: float = field(default=0.1, metadata={"help": "Clients' SGD learning rate."})
    learning_rate_decay: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate after every round."}
    )
    momentum: float = field(default=0.0, metadata={"help": "Clients' SGD momentum."})
    weight_decay: float = field(default=0.0, metadata={"help": "Clients' SGD weight decay."})
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip the gradient's norm to this; None does not clip."}
    )
    jacobian_correction: float = field(
        default=0.0, metadata={"help": "Strength of the Jacobian correction; 0: off."}
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
    uplink_codec: str = field(
        default="identity",
        metadata={
            "help": "How updates travel: identity, float16, bfloat16, int8, int4, topk:FRACTION, "
            "or several joined by '+', such as topk:0.1+int8."
        },
    )
    downlink_codec: str = field(
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
    quorum: float = field(
        default=0.0,
        metadata={"help": "Share of the cohort whose updates must be usable, in [0, 1]."},
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
    report_to: str | None = field(
        default=None, metadata={"help": "Accelerate tracker, such as tensorboard or wandb."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bar."})

    def __post_init__(self) -> None:
        if self.client_fraction is not None and self.clients_per_round is not None:
            raise ArgumentsError("give client_fraction or clients_per_round, not both")
        if self.client_fraction is not None and not 0 < self.client_fraction <= 1:
            raise ArgumentsError(f"client_fraction must be in (0, 1], got {self.client_fraction}")
        for name, least in (
            ("num_rounds", 0),
            ("num_local_epochs", 1),
            ("per_client_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("eval_batch_size", 1),
            ("eval_every", 0),
            ("save_every", 0),
        ):
            if getattr(self, name) < least:
                raise ArgumentsError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ArgumentsError(
                    f"{name} must be one of {choices}, got {getattr(self, name)!r}"
                )
        if not 0 <= self.drop_out_probability < 1:
            raise ArgumentsError(
                f"drop_out_probability must be in [0, 1), got {self.drop_out_probability}"
            )
        if not 0 <= self.quorum <= 1:
            raise ArgumentsError(f"quorum must be in [0, 1], got {self.quorum}")
        for name in ("max_update_norm", "clip_update_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ArgumentsError(f"{name} must be positive, got {value}; None is without")
        if self.dp_noise_multiplier < 0 or not 0 < self.dp_delta < 1:
            raise ArgumentsError(
                "dp_noise_multiplier must not be negative and dp_delta must be in (0, 1), got "
                f"{self.dp_noise_multiplier} and {self.dp_delta}"
            )
        if self.dp_noise_multiplier and self.clip_update_norm is None:
            raise ArgumentsError(
                "dp_noise_multiplier needs clip_update_norm: noise protects only what is bounded"
            )
        if self.dp_noise_multiplier and self.aggregation != "mean":
            raise ArgumentsError(
                f"dp_noise_multiplier needs aggregation='mean', got {self.aggregation!r}"
            )
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ArgumentsError(
                f"save_total_limit must be at least 1, got {self.save_total_limit}; None keeps all"
            )
        for name in ("learning_rate", "learning_rate_decay"):
            # 0 would freeze the model from the second round on, without a sign of it.
            if not getattr(self, name) > 0:
                raise ArgumentsError(
                    f"{name} must be positive, got {getattr(self, name)}; a decay of 1 keeps the "
                    "learning rate"
                )
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise ArgumentsError(
                f"clients_per_round must be at least 1, got {self.clients_per_round}"
            )
        if self.jacobian_correction < 0:
            raise ArgumentsError(
                f"jacobian_correction must not be negative, got {self.jacobian_correction}"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ArgumentsError(
                f"max_grad_norm must be positive, got {self.max_grad_norm}; None does not clip"
            )

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

    def learning_rate_at(self, round: int) -> float:
        """Clients' learning rate in a round, counted from 0."""
        return self.learning_rate * self.learning_rate_decay**round
