"""Derived randomness: every purpose has its own stream, so that no draw shifts another."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_CPU = torch.device("cpu")


def derived_seed(seed: int, *labels: int | str) -> int:
    """A 63-bit seed from the run's seed and what it is for (round, client, purpose)."""
    text = "\x1f".join(str(part) for part in (seed, *labels))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(seed: int, *labels: int | str) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *labels))


def numpy_generator(seed: int, *labels: int | str) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    return np.random.default_rng(derived_seed(seed, *labels))


class Generators(NamedTuple):
    """States of the global generators."""

    of_torch: Tensor
    of_device: Tensor | None
    of_numpy: Any
    of_python: Any

    @classmethod
    def now(cls, device: torch.device = _CPU) -> Generators:
        """As they are."""
        own = None
        if device.type == "cuda":
            own = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            own = torch.mps.get_rng_state()
        return cls(torch.get_rng_state(), own, np.random.get_state(), random.getstate())

    def put_back(self, device: torch.device = _CPU) -> None:
        """Go on from here."""
        torch.set_rng_state(self.of_torch)
        if self.of_device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.of_device, device)
        elif self.of_device is not None:
            torch.mps.set_rng_state(self.of_device)
        np.random.set_state(self.of_numpy)
        random.setstate(self.of_python)

    def moved(self, since: Generators) -> str | None:
        """Whose generator somebody drew from since then; None if nobody did."""
        if self.of_python != since.of_python:
            return "Python's random"
        if any(
            not np.array_equal(a, b) for a, b in zip(self.of_numpy, since.of_numpy, strict=True)
        ):
            return "NumPy"
        pairs = (self.of_torch, since.of_torch), (self.of_device, since.of_device)
        same = all(a is b or (a is not None and b is not None and a.equal(b)) for a, b in pairs)
        return None if same else "torch"


@contextmanager
def preserved(device: torch.device = _CPU) -> Iterator[None]:
    """Put the global generators back afterwards: torch's (the device's too), NumPy's and Python's.

    This takes a tenth of a millisecond, :func:`reseed` a tenth of that.
    """
    before = Generators.now(device)
    try:
        yield
    finally:
        before.put_back(device)


@contextmanager
def seeded(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Seed the generators that dropout, transforms and collators draw from; put them back."""
    with preserved(device):
        reseed(seed, device)
        yield


def reseed(seed: int, device: torch.device = _CPU) -> None:
    """Seed the global generators (``torch.manual_seed`` records tracebacks, which takes time)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    np.random.seed((seed ^ seed >> 32) & 0xFFFFFFFF)  # a list of both halves takes longer
    random.seed(seed)
