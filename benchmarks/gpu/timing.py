"""Paired times on either device: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Time of a block of calls, in which the clock's own cost is lost.
_BLOCK_S = 1.5e-3
_MOST_CALLS = 50
_FEWEST_BLOCKS = 7


def paired(
    functions: Mapping[str, Callable[[], Any]], device: str, seconds: float, most: int = 200
) -> dict[str, list[float]]:
    """Time functions in turn, block by block: A B C A B C …; milliseconds a call of each.

    The device is idle when a block begins, and calls of a block follow each other without waiting:
    what a loop of steps takes, with what launching costs where the kernels do not hide it.

    Args:
        functions: by name; each was called before in its warm-up.
        device: ``cuda`` or ``cpu``.
        seconds: for each function.
        most: blocks of each.
    """
    calls = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        once = time.perf_counter() - start
        calls[name] = max(1, min(_MOST_CALLS, round(_BLOCK_S / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    blocks = 0
    while blocks < _FEWEST_BLOCKS or (time.perf_counter() < end and blocks < most):
        for name, function in functions.items():
            times[name].append(_block(function, calls[name], device))
        blocks += 1
    return times


def _block(function: Callable[[], Any], calls: int, device: str) -> float:
    synchronize(device)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls
    begun = time.perf_counter()
    for _ in range(calls):
        function()
    return 1e3 * (time.perf_counter() - begun) / calls


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> list[float]:
    """Median, and the quarters below and above it."""
    if len(values) < 2:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{v:.5g}") for v in (middle, low, high)]


def compared(times: Mapping[str, list[float]], ours: str) -> dict[str, Any]:
    """Of a row: times of all, and ours relative to each other's, block by block."""
    return {
        "ms": {name: spread(values) for name, values in times.items()},
        "of": {
            name: spread([a / b for a, b in zip(times[ours], values, strict=True)])
            for name, values in times.items()
            if name != ours
        },
        "blocks": len(times[ours]),
    }


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph's replay of a function: its kernels without what launching them costs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replay: Callable[[], Any] = graph.replay
    return replay
