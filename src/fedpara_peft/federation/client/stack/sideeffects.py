"""What running a model changes beside what it returns."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ....tuner.layer import FedParaLayer
from ...random import Generators

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
            for module, name, attributes in self._attributes
            for key, value in attributes.items()
            if type(value) in _CONTAINERS and key not in _made_again(module)
        ]
        self._buffers = [(name, b, b.clone(), b._version) for name, b in model.named_buffers()]
        self._generators = Generators.now(device)

    def found(self) -> str | None:
        """What has changed since; None if nothing has."""
        for module, name, before in self._attributes:
            now = vars(module)
            for key in (before.keys() | now.keys()) - _made_again(module):
                if key not in before or key not in now or not _same(before[key], now[key]):
                    return f"its forward changes {key!r} of {_shown(name)}"
        for name, container, content in self._contents:
            if not _same_contents(container, content):
                return f"its forward changes what {_shown(name)} holds"
        for name, buffer, _, version in self._buffers:
            if buffer._version != version:
                return f"its forward changes the buffer {name!r}"
        if owner := Generators.now(self._device).moved(self._generators):
            return f"it draws random numbers from {owner}"
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
        self._generators.put_back(self._device)


def _made_again(module: nn.Module) -> set[str]:
    """What a module makes again from its weights, where these are others than before."""
    return {"_flat_weights", "_flat_weight_refs"} if isinstance(module, nn.RNNBase) else set()


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
