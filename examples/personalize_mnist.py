r"""A model for each client: pFedPara, FedPer, FedAvg and training alone, on its own digits.

    python examples/personalize_mnist.py --output_dir outputs/personal --smoke True
    python examples/personalize_mnist.py --output_dir outputs/personal  # MNIST, by classes
    python examples/personalize_mnist.py --output_dir outputs/personal \
        --data flwrlabs/femnist --label_column character --writer_column writer_id

A client holds images of at most two classes (or is one writer of FEMNIST). A fifth of its data is
held out, and every client's own model is tested on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Subset, TensorDataset, random_split
from transformers import HfArgumentParser

from fedpara_peft import (
    FederatedArguments,
    FederatedTrainer,
    FedParaConfig,
    LocalOnly,
    accuracy,
    partition,
)

METHODS = ("pfedpara", "fedper", "fedavg", "local")


@dataclass
class PersonalArguments:
    """What is compared on which data."""

    method: str = field(default="all", metadata={"help": f"One of {METHODS}, or all."})
    data: str = field(
        default="ylecun/mnist", metadata={"help": "A Hub data set or a folder with its files."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    writer_column: str | None = field(
        default=None, metadata={"help": "Make a client of each value of this column."}
    )
    num_clients: int = field(default=10, metadata={"help": "Clients."})
    examples_per_client: int = field(default=600, metadata={"help": "At most so many, a client."})
    gamma: float = field(default=0.2, metadata={"help": "pFedPara's rank ratio."})
    smoke: bool = field(default=False, metadata={"help": "scikit-learn's digits, three rounds."})


def load_images(personal: PersonalArguments) -> tuple[TensorDataset, list[Any] | None]:
    """Pixels in [0, 1] with their classes, and every image's writer where there are any."""
    if personal.smoke:
        digits = load_digits()
        return TensorDataset(
            torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
        ), None
    try:
        rows = load_dataset(personal.data, split="train")
    except Exception as error:
        raise SystemExit(
            f"cannot load {personal.data!r} ({error}): give a local folder with --data, or try "
            "--smoke True, which needs no data set"
        ) from None
    writers = None
    if personal.writer_column is not None:
        writers = rows[personal.writer_column]
    else:  # as many as are asked for, from all classes
        wanted = personal.num_clients * personal.examples_per_client
        rows = rows.shuffle(seed=0).select(range(min(len(rows), wanted)))
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in rows["image"]])
    images = torch.from_numpy(pixels.reshape(len(rows), -1) / 255)
    return TensorDataset(images, torch.tensor(rows[personal.label_column])), writers


def split_clients(
    data: TensorDataset, writers: Sequence[Any] | None, personal: PersonalArguments, seed: int
) -> tuple[list[Subset], list[Subset]]:
    """Every client's training and held-out data."""
    if writers is None:
        parts = partition(data, "classes_per_client", personal.num_clients, seed, classes=2)
    else:
        codes = np.unique(writers, return_inverse=True)[1]
        chosen = np.argsort(-np.bincount(codes), kind="stable")[: personal.num_clients]
        parts = [Subset(data, np.flatnonzero(codes == code).tolist()) for code in chosen]
    generator = torch.Generator().manual_seed(seed)
    pairs = [random_split(part, [0.8, 0.2], generator) for part in parts]
    return [train for train, _ in pairs], [held_out for _, held_out in pairs]


def build(
    method: str, inputs: int, classes: int, personal: PersonalArguments, seed: int
) -> nn.Module:
    """Two fully connected layers; pFedPara factorizes both, so that the classifier is personal."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, classes))
    if method != "pfedpara":
        return model
    config = FedParaConfig(
        gamma=personal.gamma,
        parameterization="pfedpara",
        base_weight="replaced",
        target_modules=["0", "2"],
    )
    return get_peft_model(model, config)


def train(
    method: str,
    personal: PersonalArguments,
    args: FederatedArguments,
    data: TensorDataset,
    writers: Sequence[Any] | None = None,
) -> FederatedTrainer:
    """Train one method; the trainer then has the global model and every client's own."""
    clients, held_out = split_clients(data, writers, personal, args.seed)
    images, labels = data.tensors
    model = build(method, images.shape[1], int(labels.max()) + 1, personal, args.seed)
    trainer = FederatedTrainer(
        model,
        replace(args, local_modules=["2"] if method == "fedper" else None),
        clients,
        client_eval_dataset=held_out,
        compute_metrics=accuracy,
        strategy=LocalOnly() if method == "local" else None,
    )
    trainer.train()
    return trainer


def main() -> None:
    """Compare the methods."""
    parser = HfArgumentParser((PersonalArguments, FederatedArguments))
    parser.set_defaults(
        num_rounds=20, num_local_epochs=5, per_client_batch_size=10, learning_rate=0.05,
        learning_rate_decay=0.999, max_grad_norm=5.0,
    )  # fmt: skip
    personal, args = parser.parse_args_into_dataclasses()
    if personal.smoke:
        args.num_rounds = min(args.num_rounds, 3)
    data, writers = load_images(personal)
    print("method    own test data: mean   worst tenth   spread   sent up and down")
    for method in METHODS if personal.method == "all" else (personal.method,):
        where = f"{args.output_dir}/{method}"
        trainer = train(method, personal, replace(args, output_dir=where), data, writers)
        found, sent = trainer.history[-1].metrics, trainer.history.total_bytes
        print(
            f"{method:9s} {found['client_accuracy_mean']:18.1%} "
            f"{found['client_accuracy_worst_decile']:13.1%} {found['client_accuracy_std']:8.1%} "
            f"{sent / 1e6:15.1f} MB"
        )


if __name__ == "__main__":
    main()
