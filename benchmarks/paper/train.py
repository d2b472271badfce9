"""Train one cell with the examples' data, models and losses."""

from __future__ import annotations

import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset, random_split

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import lstm_shakespeare
import personalize_mnist
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

from cells import FAN_IN_HE, Cell  # isort: skip

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
}
#: Ablations that are a field of the configuration.
MODEL_VARIANTS: dict[str, dict[str, Any]] = {
    "tanh": {"nonlinearity": "tanh"},
}
#: Stages of a net, its hidden dense layers, and the pixels of an image's side.
NETS = {"VGG16": (CHANNELS, 2, 32), "VGG4": (((64,), (128,), (256,), (512,)), 0, 16)}


@dataclass
class Task:
    """What a trainer is made of."""

    model: nn.Module
    clients: list[Any]
    compute_loss: Callable[..., Any] | None = None
    test: Any = None
    clients_test: list[Any] | None = None
    metric: str = "eval_accuracy"


def train(cell: Cell, data: str) -> dict[str, Any]:
    """Train the cell and report accuracy, bytes and time by round."""
    of = cell.of
    task = {"shakespeare": _text, "mnist": _personal}.get(cell.task, _images)(cell, data)
    rounds = of.num_rounds if cell.rounds is None else cell.rounds
    skewed = cell.split != "iid" and of.skewed_epochs
    assert cell.learning_rate is not None
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedArguments(
            folder, num_rounds=rounds, clients_per_round=of.clients_per_round,
            num_local_epochs=skewed or of.num_local_epochs, per_client_batch_size=of.batch_size,
            learning_rate=cell.learning_rate, learning_rate_decay=of.learning_rate_decay,
            max_grad_norm=of.max_grad_norm, uplink_codec=cell.codec, seed=cell.seed,
            local_modules=["2"] if cell.method == "fedper" else None,
            eval_every=max(1, rounds // 12), disable_tqdm=True,
            **RUN_VARIANTS.get(cell.variant, {}),
        )  # fmt: skip
        strategy = "LocalOnly" if cell.method == "local" else cell.strategy
        trainer = FederatedTrainer(
            task.model, args, task.clients, task.test, client_eval_dataset=task.clients_test,
            compute_loss=task.compute_loss, compute_metrics=accuracy,
            strategy=getattr(fedpara_peft, strategy)(**STRATEGIES.get(strategy, {})),
        )  # fmt: skip
        start = time.perf_counter()
        history = trainer.train()
        seconds = time.perf_counter() - start
    where = environment()
    last = history[-1].metrics
    return {
        "accuracy": last[task.metric],
        "train_loss": history[-1].train_loss,
        "worst_decile": last.get("client_accuracy_worst_decile"),
        "parameters": vision.trained(task.model),
        "bytes": history.total_bytes,
        "curve": history.curve(task.metric),
        "seconds": round(seconds, 1),
        "turn_s": round(sum(r.seconds for r in history) / sum(len(r.cohort) for r in history), 4),
        "hardware": where["gpu"] or f"{where['cpu']}, {where['threads']} threads",
        "versions": {n: where[n] for n in ("torch", "peft", "fedpara-peft")},
    }


def factorize(model: nn.Module, targets: list[str], cell: Cell) -> nn.Module:
    """Replace the targets' weights by the method's; other methods train them dense."""
    if cell.method not in ("fedpara", "lowrank", "pfedpara"):
        return model
    config = FedParaConfig(
        gamma=cell.gamma, parameterization=cell.method, base_weight="replaced",
        target_modules=targets, **MODEL_VARIANTS.get(cell.variant, {}),
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
    train, test = _load_images(data, cell.of.examples, size)
    how = {"concentration": 0.5} if cell.split == "dirichlet" else {}
    clients = partition(train, cell.split, cell.of.num_clients, cell.seed, **how)
    torch.manual_seed(cell.seed)
    model = vgg(stages, int(train.tensors[1].max()) + 1, cell.of.width, hidden)
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return Task(factorize(model, convolutions, cell), clients, vision.loss, test)


def _text(cell: Cell, data: str) -> Task:
    text = lstm_shakespeare.TextArguments(
        data=data, num_clients=cell.of.num_clients, split=cell.split
    )
    clients, test, characters = lstm_shakespeare.split_roles(_load_text(data), text, cell.seed)
    torch.manual_seed(cell.seed)
    model = lstm_shakespeare.CharLSTM(characters, round(256 * cell.of.width))
    return Task(factorize(model, ["lstm"], cell), clients, lstm_shakespeare.loss, test)


def _personal(cell: Cell, data: str) -> Task:
    rows = _load_digits(data, cell.of.num_clients, cell.of.examples)
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
        factorize(model, ["0", "2"], cell),
        [train for train, _ in pairs],
        clients_test=[test for _, test in pairs],
        metric="client_accuracy_mean",
    )


@functools.lru_cache(maxsize=1)
def _load_images(data: str, examples: int | None, size: int) -> tuple[TensorDataset, TensorDataset]:
    train, test = vision.load_images(vision.VisionArguments(data=data, examples=examples))
    return _shrunk(train, size), _shrunk(test, size)


def _shrunk(data: TensorDataset, size: int) -> TensorDataset:
    """The images at fewer pixels, each the mean of those it stands for."""
    images, labels = data.tensors
    small = F.adaptive_avg_pool2d(images.float(), size).round().to(images.dtype)
    return TensorDataset(small, labels)


@functools.lru_cache(maxsize=1)
def _load_text(data: str) -> Any:
    return lstm_shakespeare.load_windows(data, smoke=False)


@functools.lru_cache(maxsize=1)
def _load_digits(data: str, clients: int, examples: int | None) -> TensorDataset:
    settings = personalize_mnist.PersonalArguments(
        data=data, num_clients=clients, examples_per_client=examples or 6000
    )
    return personalize_mnist.load_images(settings)[0]
