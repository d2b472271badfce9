"""A cell is one training run; it is trained once and its result is a line in a file of JSON lines.

A run that was interrupted goes on with the first cell that has no line yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results" / "paper"
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # no table uses it


@dataclass(frozen=True)
class Scale:
    """How large the runs of a task are.

    Attributes:
        grid: learning rates that every method is tuned over; one rate is not tuned.
        tuning_rounds: rounds of a tuning run.
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
    max_grad_norm: float = 5.0


#: The paper's set-up for one GPU, and what two CPU cores do in minutes.
SCALES: dict[tuple[str, str], Scale] = {
    ("full", "cifar10"): Scale(100, 16, 200, 10, 64, (0.1,), 0, 0.992, skewed_epochs=5),
    ("full", "cifar100"): Scale(50, 8, 400, 10, 64, (0.1,), 0, 0.992, skewed_epochs=5),
    ("full", "cinic10"): Scale(100, 16, 300, 10, 64, (0.1,), 0, 0.992, skewed_epochs=5),
    ("full", "shakespeare"): Scale(100, 16, 500, 1, 64, (1.0,), 0, 0.992),
    ("full", "mnist"): Scale(10, 10, 100, 5, 10, (0.01, 0.03, 0.1), 100, 0.999),
    ("cpu", "cifar10"): Scale(20, 2, 24, 1, 16, (0.01, 0.03, 0.1, 0.3), 8, 0.935, 0.25, "VGG4"),
    ("cpu", "shakespeare"): Scale(
        40, 8, 45, 1, 10, (4.0, 8.0, 16.0, 32.0), 15, 0.965, 0.5, max_grad_norm=0.5
    ),
    ("cpu", "mnist"): Scale(10, 10, 15, 5, 10, (0.1, 0.2, 0.4), 8, 0.999, examples=300),
}

FAN_IN_HE = "He's fan-in variance in every factor"
FEW_IMAGES = "2,000 images, 120 rounds"
#: Variants that are of another scale than their task.
RESCALED: dict[str, dict[str, Any]] = {
    FEW_IMAGES: {"examples": 2000, "num_clients": 2, "num_rounds": 120,
                 "learning_rate_decay": 0.98},
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        task: ``"cifar10"``, ``"cifar100"``, ``"cinic10"``, ``"shakespeare"`` or ``"mnist"``.
        scale: ``"cpu"`` or ``"full"``.
        split: ``"iid"``; ``"dirichlet"``; ``"role"``; ``"classes"``, at most two of them a client.
        variant: an ablation; see ``train.py``.
        share: of the training data that is used.
        rounds: None for the scale's.
        learning_rate: None for the one that tuning finds.
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

    @property
    def of(self) -> Scale:
        """The scale's figures."""
        return replace(SCALES[self.scale, self.task], **RESCALED.get(self.variant, {}))

    def tuning(self) -> list[Cell]:
        """Runs whose best rate this cell takes: of its method with FedAvg as it is, and IID."""
        base = Cell(self.task, self.scale, self.method, gamma=DEFAULT_GAMMA[self.task],
                    split=self.split if self.task == "mnist" else "iid", share=self.share,
                    seed=TUNING_SEED,
                    rounds=self.of.tuning_rounds)  # fmt: skip
        return [replace(base, learning_rate=rate) for rate in self.of.grid]

    def key(self) -> str:
        """What tells it from all others: its settings that are not the defaults."""
        given = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }
        return json.dumps(given, sort_keys=True)


DEFAULT_GAMMA = {"cifar10": 0.1, "cifar100": 0.4, "cinic10": 0.3, "shakespeare": 0.0, "mnist": 0.2}


class Results:
    """The results of cells, by what they are."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._found: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                row = json.loads(line)
                self._found[Cell(**row["cell"]).key()] = row

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Look a cell up; its rate is the tuned one if it has none of its own.

        A task that a scale does not have was not run.
        """
        tuned = self.tuned(cell) if (cell.scale, cell.task) in SCALES else None
        return None if tuned is None else self._found.get(tuned.key())

    def hardware(self, scale: str, task: str) -> set[str]:
        """Where the runs of a task were made, and with what."""
        return {
            ", ".join([row["hardware"], *(f"{n} {v}" for n, v in row["versions"].items())])
            for row in self._found.values()
            if (row["cell"]["scale"], row["cell"]["task"]) == (scale, task)
        }

    def tuned(self, cell: Cell) -> Cell | None:
        """Give the cell its learning rate; None while tuning is not finished."""
        if cell.learning_rate is not None:
            return cell
        if len(cell.of.grid) == 1:
            return replace(cell, learning_rate=cell.of.grid[0])
        found = [(c, self._found.get(c.key())) for c in cell.tuning()]
        if any(row is None for _, row in found):
            return None
        best = max(found, key=lambda pair: pair[1]["accuracy"])[0]
        return replace(cell, learning_rate=best.learning_rate)

    def missing(self, cells: Iterable[Cell]) -> Iterable[Cell]:
        """Cells still to be trained, what others wait for first; looked at anew at each step."""
        for cell in cells:
            if self.tuned(cell) is None:
                yield from (c for c in cell.tuning() if c.key() not in self._found)
            tuned = self.tuned(cell)
            assert tuned is not None
            if tuned.key() not in self._found:
                yield tuned

    def train(self, cells: Iterable[Cell], train: Callable[[Cell], dict[str, Any]]) -> None:
        """Train what is missing and write each result down at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for cell in self.missing(cells):
            row = {"cell": asdict(cell), **train(cell)}
            with (self.folder / f"{cell.scale}-{cell.task}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._found[cell.key()] = row
            print(f"{row['accuracy']:.1%} in {row['seconds']:.0f} s: {cell.key()}", flush=True)
