"""``FederatedArguments``: what is evaluated, kept and shown of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class WatchingArguments:
    """What is evaluated, kept and shown of a run."""

    engine: str = field(
        default="auto",
        metadata={
            "help": "sequential: one client after the other; batched: clients whose steps have "
            "equally many rows side by side, the same up to rounding; auto: batched where it is "
            "known to pay, in one process.",
            "choices": ["auto", "sequential", "batched"],
        },
    )
    eval_every: int = field(
        default=1, metadata={"help": "Evaluate every so many rounds and after the last; 0: never."}
    )
    eval_batch_size: int = field(default=256, metadata={"help": "Examples per evaluation step."})
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric by which the best round is found, with eval_ before it or without; "
            "loss if that is needed. Its checkpoint is not removed by save_total_limit."
        },
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether more of that metric is better; by default its name tells."},
    )
    load_best_model_at_end: bool = field(
        default=False,
        metadata={
            "help": "Write a checkpoint of every round that is the best so far, and load the best "
            "one when the run ends."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when the metric was not better for so many evaluations, one after the "
            "other; never by default."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much it must be better to count as such."}
    )
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
