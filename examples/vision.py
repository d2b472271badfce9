"""What the image examples share: data, clients, the compared methods and the run.

The paper's settings are the defaults; every setting of the federation is an option too. With
``--save_every`` a run that was interrupted goes on when it is started again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset, random_split
from transformers import HfArgumentParser

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig, accuracy, partition
from fedpara_peft.federation.strategies import STRATEGIES

METHODS = ["fedpara", "lowrank", "dense"]


@dataclass
class VisionArguments:
    """Data, its division, and the model."""

    data: str = field(
        default="uoft-cs/cifar10",
        metadata={"help": "A Hub data set (uoft-cs/cifar100, flwrlabs/cinic10) or a folder."},
    )
    examples: int | None = field(
        default=None, metadata={"help": "At most so many training images; likewise test images."}
    )
    split: str = field(default="iid", metadata={"choices": ["iid", "dirichlet"]})
    concentration: float = field(default=0.5, metadata={"help": "Dirichlet's; small is skewed."})
    num_clients: int = field(default=100, metadata={"help": "Clients."})
    method: str = field(default="fedpara", metadata={"choices": METHODS})
    gamma: float = field(
        default=0.1, metadata={"help": "Rank ratio; low-rank takes the rank of equal size."}
    )
    width: float = field(default=1.0, metadata={"help": "Factor on all channels, for CPUs."})
    strategy: str = field(default="FedAvg", metadata={"choices": list(STRATEGIES)})
    strategy_args: str = field(
        default="{}", metadata={"help": """The strategy's settings as JSON: '{"mu": 0.1}'."""}
    )
    smoke: bool = field(default=False, metadata={"help": "Small net, scikit-learn's digits."})


def load_images(vision: VisionArguments) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images as bytes, (3, 32, 32), with their classes."""
    if vision.smoke:
        digits = load_digits()
        pixels = np.kron(digits.images * 15, np.ones((4, 4)))  # 8x8 to 32x32
        images = torch.tensor(pixels, dtype=torch.uint8)[:, None].repeat(1, 3, 1, 1)
        data = TensorDataset(images[:800], torch.tensor(digits.target[:800]))
        parts = random_split(data, [600, 200], torch.Generator().manual_seed(0))
        return TensorDataset(*parts[0][:]), TensorDataset(*parts[1][:])
    try:
        rows = load_dataset(vision.data)
    except Exception as error:
        raise SystemExit(
            f"cannot load {vision.data!r} ({error}): give a local folder with --data, or try "
            "--smoke True, which needs no data set"
        ) from None
    if not {"train", "test"} <= rows.keys():
        raise SystemExit(f"{vision.data!r} has {[*rows]}: --data needs a train and a test split")
    return as_tensors(rows["train"], vision.examples), as_tensors(rows["test"], vision.examples)


def as_tensors(rows: Dataset, examples: int | None) -> TensorDataset:
    """Decode images; data sets differ in the names of their columns."""
    columns = rows.column_names
    image = next((name for name in ("img", "image") if name in columns), None)
    label = next((name for name in ("label", "fine_label") if name in columns), None)
    if image is None or label is None:
        raise SystemExit(f"--data has the columns {columns}, but needs img or image, and label")
    if examples is not None:
        rows = rows.shuffle(seed=0).select(range(min(examples, len(rows))))
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in rows[image]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images, torch.tensor(rows[label]))


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Cross-entropy and logits; images rest as bytes and become numbers here."""
    images, labels = batch
    images = (images.float() - 120) / 64
    if model.training:  # mirror every other image
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    logits = model(images)
    return F.cross_entropy(logits, labels), logits


def factorize(model: nn.Module, method: str, gamma: float) -> nn.Module:
    """Factorize all convolutions; dense layers, norms and biases are trained as they are."""
    if method == "dense":
        return model
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    config = FedParaConfig(
        gamma=gamma,
        parameterization=method,
        base_weight="replaced",
        target_modules=convolutions,
    )
    return get_peft_model(model, config)


def trained(model: nn.Module) -> int:
    """Parameters that are trained, and sent."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(name: str, build: Callable[[int, float], nn.Module]) -> None:
    """Train a net, ``build(classes, width)``, as the command line says."""
    parser = HfArgumentParser((VisionArguments, FederatedArguments))
    parser.set_defaults(
        num_rounds=200, num_local_epochs=10, per_client_batch_size=64, learning_rate=0.1,
        learning_rate_decay=0.992, max_grad_norm=5.0,
    )  # fmt: skip
    vision, args = parser.parse_args_into_dataclasses()
    if args.client_fraction is None and args.clients_per_round is None:
        args = replace(args, client_fraction=0.16)
    if vision.smoke:
        vision = replace(vision, num_clients=2, width=0.125)
        args = replace(args, num_rounds=3, num_local_epochs=3, client_fraction=1.0,
                       clients_per_round=None, per_client_batch_size=8)  # fmt: skip
    train, test = load_images(vision)
    how = {"concentration": vision.concentration} if vision.split == "dirichlet" else {}
    clients = partition(train, vision.split, vision.num_clients, args.seed, **how)
    torch.manual_seed(args.seed)
    model = build(int(train.tensors[1].max()) + 1, vision.width)
    dense = trained(model)
    model = factorize(model, vision.method, vision.gamma)
    strategy = STRATEGIES[vision.strategy](**json.loads(vision.strategy_args))
    trainer = FederatedTrainer(
        model, args, clients, test, compute_loss=loss, compute_metrics=accuracy, strategy=strategy
    )
    say = trainer.accelerator.print  # once, not from every process
    if vision.width != 1:
        name = f"{name}, {vision.width:g} times as wide,"
    say(f"{name} has {dense:,} parameters; {vision.method} trains {trained(model):,} "
        f"({trained(model) / dense:.2%})")  # fmt: skip
    history = trainer.train(resume_from_checkpoint=args.save_every > 0)
    found, sent = trainer.evaluate()["eval_accuracy"], history.total_bytes / 1e6
    say(f"test accuracy {found:.1%} after {len(history)} rounds and {sent:,.1f} MB sent")
    if trainer.accelerator.is_main_process:
        trainer.save_model(f"{args.output_dir}/model")
