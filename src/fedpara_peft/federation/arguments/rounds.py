"""``FederatedArguments``: rounds, and who takes part in them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RoundArguments:
    """Rounds, and who takes part in them."""

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
            "help": "uniform; weighted: drawn in proportion to their examples, then averaged "
            "alike; poisson: each by itself, so that cohorts differ in size, for the least ε.",
            "choices": ["uniform", "weighted", "poisson"],
        },
    )
    drop_out_probability: float = field(
        default=0.0, metadata={"help": "Chance that a sampled client does not report, in [0, 1)."}
    )
