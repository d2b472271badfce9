"""What a client keeps of its optimizer: tensors by what torch calls them and by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...comm.state import State
from ..errors import ArgumentsError

Kept = Mapping[str, State]

#: Numbers that are no tensors, by the name of their type, which their part's name then ends in.
_NUMBERS = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}
#: A part that all entries of a tensor share, and all clients of a stack.
_SHARED = "step"


def kept_of(optimizers: Sequence[Optimizer], names: Mapping[Tensor, str]) -> dict[str, State]:
    """The optimizers' states.

    Raises:
        ArgumentsError: a state holds what is neither tensor nor number.
    """
    found: dict[str, State] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for part, value in state.items():
                kind = type(value).__name__
                if kind in _NUMBERS:
                    value, part = torch.tensor(value, dtype=_NUMBERS[kind]), f"{part} {kind}"
                if isinstance(value, Tensor) and "/" not in part:
                    found.setdefault(part, {})[names[parameter]] = value.detach()
                elif value is not None:
                    raise ArgumentsError(
                        f"optimizer_state='keep' keeps tensors and numbers, and the "
                        f"{type(optimizer).__name__} has a {kind} in its {part!r}: use "
                        "optimizer_state='reset'"
                    )
    return found


def put_back(optimizers: Sequence[Optimizer], names: Mapping[Tensor, str], kept: Kept) -> None:
    """Give new optimizers copies of what :func:`kept_of` found."""
    for optimizer, group, parameter in _held(optimizers):
        on_cpu = not (group.get("capturable") or group.get("fused"))
        for part, state in kept.items():
            if names[parameter] not in state:
                continue
            value = state[names[parameter]]
            name, _, kind = part.partition(" ")
            # torch counts steps where it need not wait for an accelerator.
            device = value.device if name == _SHARED and on_cpu else parameter.device
            own = value.item() if kind in _NUMBERS else value.to(device, copy=True)
            optimizer.state[parameter][name] = own


def stacked(kept: Sequence[Kept]) -> dict[str, State]:
    """The states of clients that are alike (see :func:`likeness`), ``(clients, …)``."""
    return {
        part: {
            n: t if part == _SHARED else torch.stack([one[part][n] for one in kept])
            for n, t in state.items()
        }
        for part, state in kept[0].items()
    }


def unstacked(kept: Kept, client: int) -> dict[str, State]:
    """The state of one client of a stack, in memory of its own."""
    return {
        part: {n: (t if part == _SHARED else t[client]).clone() for n, t in state.items()}
        for part, state in kept.items()
    }


def likeness(kept: Kept) -> tuple[Any, ...]:
    """What must be equal for two clients' states to go into one stack."""
    return tuple(
        (part, name, float(tensor) if part == _SHARED else tensor.shape)
        for part, state in sorted(kept.items())
        for name, tensor in sorted(state.items())
    )


def options_of(optimizers: Sequence[Optimizer]) -> list[dict[str, str]]:
    """The options of all groups, some of which an optimizer may change as it goes."""
    return [
        {name: repr(value) for name, value in group.items() if name != "params"}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def _held(
    optimizers: Sequence[Optimizer],
) -> Iterator[tuple[Optimizer, dict[str, Any], Tensor]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, group, parameter
