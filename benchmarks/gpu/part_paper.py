"""The paper's CIFAR-10 run at its own size, as far as there is time; the next call goes on."""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from session import Session
from torch.utils.data import Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
import cells
import train

#: The run's checkpoint as one file, beside the tables.
KEPT = "paper-checkpoint.tar"
#: Rounds between checkpoints, and between evaluations.
_ROUNDS = 5


def measure(session: Session, options: argparse.Namespace) -> None:
    """FedPara, γ = 0.1, IID: 100 clients, 16 a round, 10 local epochs of batches of 64."""
    cell = cells.Cell("cifar10", "full", "fedpara", learning_rate=0.1)
    if session.smoke:
        task = _made_up()
    elif options.cifar10 is None:
        session.add("skipped", why="no --cifar10 FOLDER was given")
        return
    else:
        task = train.build(cell, {"cifar10": str(options.cifar10)})
    model = train.factorize(task.model, task.targets, cell)
    goal, step = (2, 1) if session.smoke else (cell.of.num_rounds, _ROUNDS)
    small = {"clients_per_round": 2, "num_local_epochs": 1} if session.smoke else {}
    kept = session.out / KEPT
    with tempfile.TemporaryDirectory() as folder:
        if kept.exists():
            with tarfile.open(kept) as archive:
                archive.extractall(folder, filter="data")
        done, longest = _rounds(folder), 0.0
        while done < goal and session.left > longest:
            start = time.monotonic()
            done = min(goal, done + step)
            args = train.arguments(
                cell, Path(folder), num_rounds=done, eval_every=step, save_every=step, **small
            )
            trainer = train.trainer_of(cell, task, model, args)
            diverged = train.run(trainer)
            _keep(Path(folder), kept)
            longest = max(longest, time.monotonic() - start)
            session.add(
                "run", rounds=len(trainer.history), of=cell.of.num_rounds,
                **train.described(task, model, trainer.history, diverged),
            )  # fmt: skip
            if diverged:
                raise RuntimeError(f"the run diverged in round {len(trainer.history) + 1}")


def _rounds(folder: str) -> int:
    saved = [int(p.name.rpartition("-")[2]) for p in Path(folder).glob("checkpoint-*")]
    return max(saved, default=0)


def _keep(folder: Path, archive: Path) -> None:
    """The folder as one file, whole at any time."""
    fresh = archive.with_suffix(".new")
    with tarfile.open(fresh, "w") as file:
        for path in sorted(folder.iterdir()):
            file.add(path, path.name)
    shutil.move(fresh, archive)


def _made_up() -> train.Task:
    """A run of the same form, for trying it out."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    data = TensorDataset(images, torch.randint(10, (64,)))
    model = train.vgg(((16,), (32,), (32,), (32,), (32,)), 10)
    parts = [Subset(data, range(i, i + 16)) for i in (0, 16, 32)]
    return train.Task(model, ["0", "4"], parts, train.vision.loss, data)
