"""The data of the paper's tasks, decoded once, kept where the model trains."""

from __future__ import annotations

import functools
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import lstm_shakespeare
import personalize_mnist
import vision

#: Decoded images, for all processes of this machine.
CACHE = Path(tempfile.gettempdir()) / "fedpara-images"


@functools.lru_cache(maxsize=1)
def images(data: str, examples: int | None, size: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images of ``size`` pixels a side; from the cache, if they are there."""
    name = hashlib.blake2b(repr((data, examples, size)).encode(), digest_size=8).hexdigest()
    file = CACHE / f"{name}.pt"
    if file.exists():
        parts = torch.load(file, mmap=True)  # processes share what they read
    else:
        loaded = vision.load_images(vision.VisionArguments(data=data, examples=examples))
        parts = [_shrunk(part, size) for part in loaded]
        CACHE.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as partial:
            torch.save(parts, partial)
        Path(partial.name).replace(file)
    device = PartialState().device
    train, test = (TensorDataset(*(t.to(device) for t in part)) for part in parts)
    return train, test


def _shrunk(data: TensorDataset, size: int) -> list[torch.Tensor]:
    """The images at fewer pixels, each the mean of those it stands for, and their labels."""
    images, labels = data.tensors
    small = F.adaptive_avg_pool2d(images.float(), size).round().to(images.dtype)
    return [small, labels]


def plays(data: str, text: lstm_shakespeare.TextArguments, seed: int) -> tuple[Any, Any, int]:
    """The clients' windows, those held out, and how many characters there are."""
    clients, test, characters = lstm_shakespeare.split_roles(_windows(data), text, seed)
    whole = test
    while isinstance(whole, Subset):
        whole = whole.dataset
    whole.tensors = tuple(t.to(PartialState().device) for t in whole.tensors)
    return clients, test, characters


@functools.lru_cache(maxsize=1)
def _windows(data: str) -> Any:
    return lstm_shakespeare.load_windows(data, smoke=False)


@functools.lru_cache(maxsize=1)
def digits(data: str, clients: int, examples: int | None) -> TensorDataset:
    """MNIST's images as rows of pixels."""
    settings = personalize_mnist.PersonalArguments(
        data=data, num_clients=clients, examples_per_client=examples or 6000
    )
    return personalize_mnist.load_images(settings)[0]
