"""What is trained: a cell is one training run, a scale says how large the runs of a task are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pool

RESULTS = Path(__file__).parent.parent / "results" / "paper"
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # no table uses it


@dataclass(frozen=True)
class Scale:
    """How large the runs of a task are.

    Attributes:
        grid: learning rates that tuning begins with; one rate is not tuned.
        tuning_rounds: rounds of a tuning run.
        grows: whether the grid grows at an end where the best rate lies.
    """

    num_clients: int
    clients_per_round: int
    num_rounds: int
    num_local_epochs: int
    batch_size: int
    grid: tuple[float, ...]
    tuning_rounds: int = 0
    learning_rate_decay: float = 1.0
    width: float = 1.0
    net: str = "VGG16"
    examples: int | None = None  # training images; of MNIST for every client
    skewed_epochs: int | None = None  # local epochs of the split that is not IID, if others
    max_grad_norm: float | None = 5.0
    grows: bool = True


#: The paper's set-up for one GPU; what two CPU cores do in minutes; and the paper's nets at their
#: full width, for a GPU's minutes.
SCALES: dict[tuple[str, str], Scale] = {
    ("full", "cifar10"): Scale(100, 16, 200, 10, 64, (0.1,), 0, 0.992, skewed_epochs=5),
    ("full", "cifar100"): Scale(50, 8, 400, 10, 64, (0.1,), 0, 0.992, skewed_epochs=5),
    ("full", "cinic10"): Scale(100, 16, 300, 10, 64, (0.1,), 0, 0.992, skewed_epochs=5),
    ("full", "shakespeare"): Scale(100, 16, 500, 1, 64, (1.0,), 0, 0.992),
    ("full", "mnist"): Scale(10, 10, 100, 5, 10, (0.01, 0.03, 0.1), 100, 0.999, grows=False),
    ("cpu", "cifar10"): Scale(20, 2, 24, 1, 16, (0.01, 0.03, 0.1, 0.3), 8, 0.935, 0.25, "VGG4"),
    ("cpu", "shakespeare"): Scale(
        40, 8, 45, 1, 10, (4.0, 8.0, 16.0, 32.0), 15, 0.965, 0.5, max_grad_norm=0.5
    ),
    ("cpu", "mnist"): Scale(
        10, 10, 15, 5, 10, (0.1, 0.2, 0.4), 8, 0.999, examples=300, grows=False
    ),
    ("wide", "cifar10"): Scale(20, 4, 40, 1, 32, (0.03, 0.1, 0.3), 12, 0.96, net="VGG4"),
    ("wide", "cifar10-vgg16"): Scale(20, 4, 16, 1, 64, (0.03, 0.1, 0.3), 5, 0.9),
    ("wide", "shakespeare"): Scale(
        40, 8, 30, 1, 20, (4.0, 8.0, 16.0), 10, 0.95, max_grad_norm=0.5
    ),
}  # fmt: skip
#: Rates that an optimizer's tuning begins with, for every method and task.
GRIDS = {"adamw": (1e-3, 3e-3, 1e-2), "muon": (3e-3, 1e-2, 3e-2)}

FAN_IN_HE = "He's fan-in variance in every factor"
FEW_IMAGES = "2,000 images, 120 rounds"
UNCLIPPED = "gradients not clipped, a constant rate"
KEPT = "clients keep the optimizer's state"
#: Variants that are of another scale than their task.
RESCALED: dict[str, dict[str, Any]] = {
    FEW_IMAGES: {"examples": 2000, "num_clients": 2, "num_rounds": 120,
                 "learning_rate_decay": 0.98},
    UNCLIPPED: {"max_grad_norm": None, "num_rounds": 20, "learning_rate_decay": 1.0},
}  # fmt: skip
#: Variants that are tuned by themselves; others take the rate of their method as it is.
TUNED = (UNCLIPPED, KEPT, "response 0.3", "response 3")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        task: ``"cifar10"``, ``"cifar10-vgg16"``, ``"cifar100"``, ``"cinic10"``, ``"shakespeare"``
            or ``"mnist"``.
        scale: ``"cpu"``, ``"wide"`` or ``"full"``.
        method: ``"dense"``, ``"fedpara"``, ``"lowrank"``, the two with ``" seeded"`` after it for a
            base drawn from a seed, or one of figure 5.
        split: ``"iid"``; ``"dirichlet"``; ``"role"``; ``"classes"``, at most two of them a client.
        variant: an ablation; see ``train.py``.
        share: of the training data that is used.
        rounds: None for the scale's.
        learning_rate: None for the one that tuning finds.
        optim: the clients' optimizer.
    """

    task: str
    scale: str
    method: str
    split: str = "iid"
    gamma: float = 0.1
    strategy: str = "FedAvg"
    codec: str = "identity"
    variant: str = ""
    share: float = 1.0
    rounds: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    optim: str = "sgd"

    @property
    def of(self) -> Scale:
        """The scale's figures."""
        return replace(SCALES[self.scale, self.task], **RESCALED.get(self.variant, {}))

    @property
    def file(self) -> str:
        """Name of the file that has its result."""
        return f"{self.scale}-{self.task}"

    @property
    def grid(self) -> tuple[float, ...]:
        """Rates that tuning begins with."""
        return GRIDS.get(self.optim, self.of.grid)

    @property
    def grows(self) -> bool:
        """Whether tuning goes on beyond the ends of the grid."""
        return self.of.grows

    def tuning(self, rates: Sequence[float]) -> list[Cell]:
        """Runs whose best rate this cell takes: of its method with FedAvg, IID."""
        base = Cell(self.task, self.scale, self.method, gamma=DEFAULT_GAMMA[self.task],
                    split=self.split if self.task == "mnist" else "iid", share=self.share,
                    variant=self.variant if self.variant in TUNED else "", optim=self.optim,
                    seed=TUNING_SEED, rounds=self.of.tuning_rounds)  # fmt: skip
        return [replace(base, learning_rate=rate) for rate in rates]

    def key(self) -> str:
        """What tells it from all others: its settings that are not the defaults."""
        return pool.key_of(self)

    def score(self, row: dict[str, Any]) -> float:
        """Accuracy; that of a run that diverged is none."""
        return -1.0 if row.get("diverged") else row["accuracy"]


DEFAULT_GAMMA = {"cifar10": 0.1, "cifar10-vgg16": 0.1, "cifar100": 0.4, "cinic10": 0.3,
                 "shakespeare": 0.0, "mnist": 0.2}  # fmt: skip


class Results(pool.Results[Cell]):
    """The results of the paper's cells, those of this repository among them."""

    def __init__(self, *folders: Path) -> None:
        super().__init__(folders or (RESULTS,), Cell)

    def tuned(self, cell: Cell) -> Cell | None:
        """Give the cell its learning rate; a task that a scale does not have was not run."""
        return super().tuned(cell) if (cell.scale, cell.task) in SCALES else None

    def hardware(self, scale: str, task: str) -> set[str]:
        """Where the runs of a task were made, and with what."""
        return {
            ", ".join([row["hardware"], *(f"{n} {v}" for n, v in row["versions"].items())])
            for row in self.found.values()
            if (row["cell"]["scale"], row["cell"]["task"]) == (scale, task)
        }
