"""Train one cell with the examples' data, models and losses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import random_split

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import inputs
import lstm_shakespeare
import vision
from report import environment
from vgg16_cifar import CHANNELS, vgg

import fedpara_peft
from fedpara_peft import (
    FederatedArguments,
    FederatedTrainer,
    FedParaConfig,
    FedParaLayer,
    accuracy,
    partition,
)
from fedpara_peft.federation.errors import RoundError

from cells import FAN_IN_HE, KEPT, Cell  # isort: skip

#: Strategies' settings; what is not here has the class's defaults.
STRATEGIES: dict[str, dict[str, float]] = {
    "FedProx": {"mu": 0.1},
    "FedDyn": {"dyn_alpha": 0.1},
    "FedAdam": {"server_learning_rate": 0.01},
}
#: Ablations that are an argument of the run.
RUN_VARIANTS: dict[str, dict[str, Any]] = {
    "Jacobian correction, λ = 1": {"jacobian_correction": 1.0},
    "Jacobian correction, λ = 0.1": {"jacobian_correction": 0.1},
    "one factor block a round": {"factor_schedule": "one_block"},
    "decay of the product, λ = 0.001": {"composed_weight_decay": 1e-3},
    "decay of what trains, λ = 0.001": {"weight_decay": 1e-3},
    KEPT: {"optimizer_state": "keep"},
}
#: Ablations that are a field of the configuration.
MODEL_VARIANTS: dict[str, dict[str, Any]] = {
    "tanh": {"nonlinearity": "tanh"},
    "response 0.3": {"response": 0.3},
    "response 3": {"response": 3.0},
}
#: Stages of a net, its hidden dense layers, and the pixels of an image's side.
NETS = {"VGG16": (CHANNELS, 2, 32), "VGG4": (((64,), (128,), (256,), (512,)), 0, 16)}


@dataclass
class Task:
    """What a trainer is made of."""

    model: nn.Module
    targets: list[str]
    clients: list[Any]
    compute_loss: Callable[..., Any] | None = None
    test: Any = None
    clients_test: list[Any] | None = None
    metric: str = "eval_accuracy"


def train(cell: Cell, folder: Path, data: dict[str, str]) -> dict[str, Any]:
    """Train the cell, from its last checkpoint on if it was interrupted.

    Args:
        cell: with a learning rate.
        folder: for its checkpoints.
        data: where each task's data are.

    Returns:
        Accuracy, bytes and time, by round too.
    """
    task = build(cell, data)
    model = factorize(task.model, task.targets, cell)
    trainer = trainer_of(cell, task, model, arguments(cell, folder))
    diverged = run(trainer)
    return described(task, model, trainer.history, diverged)


def run(trainer: FederatedTrainer) -> bool:
    """Train; whether it diverged, which the history up to there tells more of."""
    try:
        trainer.train(resume_from_checkpoint=True)
    except RoundError as error:
        print(f"diverged: {error}", flush=True)
        return True
    return False


def build(cell: Cell, data: dict[str, str]) -> Task:
    """The cell's dense model, what of it is factorized, and its clients."""
    make = {"shakespeare": _text, "mnist": _personal}.get(cell.task, _images)
    return make(cell, data[data_of(cell.task)])


def data_of(task: str) -> str:
    """The data set of a task."""
    return task.partition("-")[0]


def arguments(cell: Cell, folder: Path, **changed: Any) -> FederatedArguments:
    """The run's settings."""
    of = cell.of
    rounds = of.num_rounds if cell.rounds is None else cell.rounds
    skewed = cell.split != "iid" and of.skewed_epochs
    every = max(1, rounds // 12)
    assert cell.learning_rate is not None
    given: dict[str, Any] = dict(
        num_rounds=rounds, clients_per_round=of.clients_per_round,
        num_local_epochs=skewed or of.num_local_epochs, per_client_batch_size=of.batch_size,
        learning_rate=cell.learning_rate, learning_rate_decay=of.learning_rate_decay,
        max_grad_norm=of.max_grad_norm, uplink_codec=cell.codec, seed=cell.seed, optim=cell.optim,
        local_modules=["2"] if cell.method == "fedper" else None, eval_every=every,
        save_every=every, save_total_limit=1, disable_tqdm=True,
        **RUN_VARIANTS.get(cell.variant, {}),
    )  # fmt: skip
    return FederatedArguments(str(folder), **{**given, **changed})


def trainer_of(
    cell: Cell, task: Task, model: nn.Module, args: FederatedArguments
) -> FederatedTrainer:
    """The cell's trainer of a model."""
    strategy = "LocalOnly" if cell.method == "local" else cell.strategy
    return FederatedTrainer(
        model, args, task.clients, task.test, client_eval_dataset=task.clients_test,
        compute_loss=task.compute_loss, compute_metrics=accuracy,
        strategy=getattr(fedpara_peft, strategy)(**STRATEGIES.get(strategy, {})),
    )  # fmt: skip


def described(task: Task, model: nn.Module, history: Any, diverged: bool) -> dict[str, Any]:
    """What is written down of a run."""
    curve = history.curve(task.metric)
    last = next((r.metrics for r in reversed(history.rounds) if r.metrics), {})
    return {
        "accuracy": last.get(task.metric, 0.0),
        "diverged": diverged,
        "refused": sum(len(report.refused) for report in history),
        "train_loss": _finite(history[-1].train_loss if len(history) else None),
        "worst_decile": last.get("client_accuracy_worst_decile"),
        "parameters": vision.trained(model),
        "bytes": history.total_bytes,
        "curve": curve,
        **times(history),
    }


def times(rounds: Iterable[Any]) -> dict[str, float]:
    """Seconds of all rounds, and of a client's turn."""
    rounds = list(rounds)
    seconds, turns = sum(r.seconds for r in rounds), sum(len(r.cohort) for r in rounds)
    return {"seconds": round(seconds, 1), "turn_s": round(seconds / max(1, turns), 4)}


def setting() -> dict[str, Any]:
    """Where the run was made, and with what."""
    where = environment()
    return {
        "hardware": where["gpu"] or f"{where['cpu']}, {where['threads']} threads",
        "versions": {n: where[n] for n in ("torch", "peft", "fedpara-peft")},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def factorize(
    model: nn.Module, targets: list[str], cell: Cell, base_seed: int | None = None
) -> nn.Module:
    """Replace the targets' weights by the method's; other methods train them dense."""
    method, _, base = cell.method.partition(" ")
    if method not in ("fedpara", "lowrank", "pfedpara"):
        return model
    seeded: dict[str, Any] = {}
    if base == "seeded":
        seeded = {"base_seed": cell.seed if base_seed is None else base_seed}
    config = FedParaConfig(
        gamma=cell.gamma, parameterization=method, base_weight=base or "replaced",
        target_modules=targets, **seeded, **MODEL_VARIANTS.get(cell.variant, {}),
    )  # fmt: skip
    model = get_peft_model(model, config)
    if cell.variant == FAN_IN_HE:
        for layer in (m for m in model.modules() if isinstance(m, FedParaLayer)):
            for name, factor in layer.named_parameters():
                if "fedpara" in name:
                    nn.init.kaiming_normal_(factor)
    return model


def _images(cell: Cell, data: str) -> Task:
    stages, hidden, size = NETS[cell.of.net]
    train, test = inputs.images(data, cell.of.examples, size)
    how = {"concentration": 0.5} if cell.split == "dirichlet" else {}
    clients = partition(train, cell.split, cell.of.num_clients, cell.seed, **how)
    torch.manual_seed(cell.seed)
    model = vgg(stages, int(train.tensors[1].max()) + 1, cell.of.width, hidden)
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return Task(model, convolutions, clients, vision.loss, test)


def _text(cell: Cell, data: str) -> Task:
    text = lstm_shakespeare.TextArguments(
        data=data, num_clients=cell.of.num_clients, split=cell.split
    )
    clients, test, characters = inputs.plays(data, text, cell.seed)
    torch.manual_seed(cell.seed)
    model = lstm_shakespeare.CharLSTM(characters, round(256 * cell.of.width))
    return Task(model, ["lstm"], clients, lstm_shakespeare.loss, test)


def _personal(cell: Cell, data: str) -> Task:
    rows = inputs.digits(data, cell.of.num_clients, cell.of.examples)
    kept = math.floor(cell.share * len(rows))
    rows, _ = random_split(rows, [kept, len(rows) - kept], torch.Generator().manual_seed(cell.seed))
    scheme, how = {
        "classes": ("classes_per_client", {"classes": 2}),
        "dirichlet": ("dirichlet", {"concentration": 0.5}),
    }[cell.split]
    labels = [int(label) for _, label in rows]
    parts = partition(rows, scheme, cell.of.num_clients, cell.seed, labels=labels, **how)
    generator = torch.Generator().manual_seed(cell.seed)
    pairs = [random_split(part, [0.8, 0.2], generator) for part in parts]
    torch.manual_seed(cell.seed)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    return Task(
        model,
        ["0", "2"],
        [train for train, _ in pairs],
        clients_test=[test for _, test in pairs],
        metric="client_accuracy_mean",
    )
