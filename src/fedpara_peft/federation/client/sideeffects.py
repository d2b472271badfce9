"""What running a model changes beside what it returns."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...tuner.layer import FedParaLayer

_CONTAINERS = (dict, OrderedDict, list, set)
_PLAIN = (int, float, str, bool, tuple, type(None), torch.Size)


class SideEffects:
    """Modules' attributes and buffers, and the global generators, as they are when this is made.

    Stacked clients would share these changes where clients in turn make them one by one, so a model
    that makes any is not stacked.

    Args:
        model: in the mode in which it will run.
        device: whose generator counts beside the CPU's.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._attributes = [
            (m, name, dict(vars(m)))
            for name, m in model.named_modules()
            if not isinstance(m, FedParaLayer)  # ours: it notes that it ran, and no more
        ]
        self._contents = [
            (name, value, value.copy())
            for _, name, attributes in self._attributes
            for value in attributes.values()
            if type(value) in _CONTAINERS
        ]
        self._buffers = [(name, b, b.clone(), b._version) for name, b in model.named_buffers()]
        self._generators = self._states()

    def found(self) -> str | None:
        """What has changed since; None if nothing has."""
        for module, name, before in self._attributes:
            now = vars(module)
            for key in before.keys() | now.keys():
                if key not in before or key not in now or not _same(before[key], now[key]):
                    return f"its forward changes {key!r} of {_shown(name)}"
        for name, container, content in self._contents:
            if not _same_contents(container, content):
                return f"its forward changes what {_shown(name)} holds"
        for name, buffer, _, version in self._buffers:
            if buffer._version != version:
                return f"its forward changes the buffer {name!r}"
        names = ("torch", "torch", "NumPy", "Python's random")
        for name, before, now in zip(names, self._generators, self._states(), strict=True):
            if repr(before) != repr(now) if name != "torch" else not torch.equal(before, now):
                return f"it draws random numbers from {name}"
        return None

    def undo(self) -> None:
        """Put everything back."""
        for module, _, before in self._attributes:
            vars(module).clear()
            vars(module).update(before)
        for _, container, before in self._contents:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        with torch.no_grad():
            for _, buffer, values, version in self._buffers:
                if buffer._version != version:
                    buffer.copy_(values)
        cpu, device, numpy_state, python_state = self._generators
        torch.set_rng_state(cpu)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(device, self._device)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    def _states(self) -> tuple[Tensor, Tensor, Any, Any]:
        cpu = torch.get_rng_state()
        on_cuda = self._device.type == "cuda"
        device = torch.cuda.get_rng_state(self._device) if on_cuda else cpu
        return cpu, device, np.random.get_state(legacy=False), random.getstate()


def _same(before: Any, now: Any) -> bool:
    return before is now or (
        type(before) is type(now) and isinstance(now, _PLAIN) and bool(before == now)
    )


def _same_contents(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(k in container and _same(v, container[k]) for k, v in before.items())
    if isinstance(container, set):
        return bool(container == before)
    return all(map(_same, before, container))


def _shown(name: str) -> str:
    return f"module {name!r}" if name else "the model"
