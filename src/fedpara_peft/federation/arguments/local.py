"""``FederatedArguments``: how a client trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .schedule import SCHEDULES


@dataclass
class LocalArguments:
    """How a client trains."""

    local_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that stay with each client (FedPer)."}
    )
    num_local_epochs: int = field(default=1, metadata={"help": "Epochs E a client trains."})
    per_client_max_steps: int = field(
        default=-1,
        metadata={
            "help": "If above 0, the local steps a client makes in a round, however much data it "
            "has; overrides num_local_epochs."
        },
    )
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
