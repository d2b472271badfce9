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
from torch.utils.data import TensorDataset

from fedpara_peft import FederatedArguments, FederatedTrainer, History, accuracy

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
        task = _made_up(cell)
    elif options.cifar10 is None:
        session.add("skipped", why="no --cifar10 FOLDER was given")
        return
    else:
        task = train._images(cell, str(options.cifar10))
    of = cell.of
    kept = session.out / KEPT
    with tempfile.TemporaryDirectory() as folder:
        if kept.exists():
            with tarfile.open(kept) as archive:
                archive.extractall(folder, filter="data")
        done, longest = _rounds(folder), 0.0
        while done < (2 if session.smoke else of.num_rounds) and session.left > longest:
            start = time.monotonic()
            done = min(of.num_rounds, done + (1 if session.smoke else _ROUNDS))
            history = _go_on(session, cell, task, folder, done)
            _keep(Path(folder), kept)
            longest = max(longest, time.monotonic() - start)
            session.add(
                "run", method=cell.method, rounds=len(history), of=of.num_rounds,
                curve=history.curve("eval_accuracy"), bytes=history.total_bytes,
                seconds=sum(report.seconds for report in history),
                turn_s=sum(r.seconds for r in history) / sum(len(r.cohort) for r in history),
            )  # fmt: skip


def _go_on(
    session: Session, cell: cells.Cell, task: train.Task, folder: str, rounds: int
) -> History:
    """Train up to this round from where the folder's checkpoint is."""
    of, small = cell.of, session.smoke
    args = FederatedArguments(
        folder, num_rounds=rounds, clients_per_round=2 if small else of.clients_per_round,
        num_local_epochs=1 if small else of.num_local_epochs,
        per_client_batch_size=of.batch_size, learning_rate=cell.learning_rate,
        learning_rate_decay=of.learning_rate_decay, max_grad_norm=of.max_grad_norm,
        eval_every=1 if small else _ROUNDS, save_every=1 if small else _ROUNDS,
        save_total_limit=1, seed=cell.seed, disable_tqdm=True,
    )  # fmt: skip
    trainer = FederatedTrainer(
        task.model, args, task.clients, task.test, compute_loss=task.compute_loss,
        compute_metrics=accuracy,
    )  # fmt: skip
    return trainer.train(resume_from_checkpoint=True)


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


def _made_up(cell: cells.Cell) -> train.Task:
    """A run of the same form for trying it out."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    data = TensorDataset(images, torch.randint(10, (64,)))
    model = train.factorize(train.vgg(((16,), (32,), (32,), (32,), (32,)), 10), ["0", "4"], cell)
    parts = [torch.utils.data.Subset(data, range(i, i + 16)) for i in (0, 16, 32)]
    return train.Task(model, parts, train.vision.loss, data)
