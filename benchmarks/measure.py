"""Paired timings and tensor memory."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def paired(
    functions: Mapping[str, Callable[[], Any]], seconds: float = 2.0
) -> dict[str, list[float]]:
    """Time functions in turn, A B C A B C …; returns milliseconds of each, pair by pair."""
    for function in functions.values():
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float:
    """Median of the ratios of paired runs."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def bytes_kept(forward: Callable[[], Any], known: list[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, beside tensors that exist anyway."""
    ours = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(kept.values())


class PeakTensorBytes(TorchDispatchMode):
    """Largest sum of live tensor storages that operations made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count the storages it made."""
        given = {t.untyped_storage()._cdata for t in _tensors(args)}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # a view makes nothing
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [t for value in values for t in _tensors(value)]
    return []


def peak_bytes(function: Callable[[], Any], tensors: Iterable[torch.Tensor]) -> int:
    """Peak of the tensors that a step makes; gradients are cleared before, so that they count.

    On a GPU what its allocator says, where these tensors are there; else counted.
    """
    tensors = list(tensors)
    for tensor in tensors:
        tensor.grad = None
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakTensorBytes() as counter:
        function()
    return counter.peak


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
