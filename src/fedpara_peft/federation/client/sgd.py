"""SGD's step, as torch makes it, without what an optimizer's class does around every step.

The class costs a small net a fifth of its step: a profiler's range, a wrapper that asks for hooks
and graphs, a walk through groups and states. Here the groups are sorted once a client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as of_all

_BUFFER = "momentum_buffer"
_WHOLE = (torch.float32, torch.float64)


def step_of(optimizer: Optimizer) -> Callable[[], Any]:
    """What makes an optimizer's step; to be called without gradients.

    For plain SGD that is the class's arithmetic in the same order, and so the same bits, on the
    optimizer's own state. For any other, and for SGD that has hooks, a step of its own, or was
    asked for one of torch's implementations, it is the optimizer's ``step``.

    Args:
        optimizer: its parameters and options stay as they are now.
    """
    if not _is_plain(optimizer):
        return optimizer.step
    steps: list[Callable[[], Any]] = [
        _Step(part, group, optimizer)
        for group in optimizer.param_groups
        for part in _alike(group["params"])
    ]
    if len(steps) == 1:
        return steps[0]

    def all_of_them() -> None:
        for step in steps:
            step()

    return all_of_them


class _Step:
    """The step of a group's parameters that have one dtype and device.

    g ← g + λ w,   v ← β v + (1 - d) g,   w ← w - η v;   Nesterov's: w ← w - η (g + β v)
    """

    def __init__(
        self, parameters: list[Tensor], group: Mapping[str, Any], optimizer: Optimizer
    ) -> None:
        self._parameters = parameters
        self._rate, self._decay = group["lr"], group["weight_decay"]
        self._momentum, self._new = group["momentum"], 1 - group["dampening"]
        self._nesterov, self._maximize = group["nesterov"], group["maximize"]
        # On a CPU the two products round halves differently, and torch's class takes the other one.
        first = parameters[0]
        self._rounds_alike = first.dtype in _WHOLE or first.device.type != "cpu"
        self._states = [optimizer.state[p] for p in parameters] if self._momentum else []

    def __call__(self) -> None:
        """Move the parameters that have gradients."""
        moving, states = self._parameters, self._states
        grads = [p.grad for p in moving if p.grad is not None]
        if len(grads) < len(moving):
            there = [i for i, p in enumerate(moving) if p.grad is not None]
            if not there:
                return
            moving, states = [moving[i] for i in there], [states[i] for i in there if states]
        if self._maximize:
            grads = [*torch._foreach_neg(grads)]
        if self._decay:
            grads = [*torch._foreach_add(grads, moving, alpha=self._decay)]
        if self._momentum:
            velocities = self._velocities(states, grads)
            grads = (
                list(torch._foreach_add(grads, velocities, alpha=self._momentum))
                if self._nesterov
                else velocities
            )
        torch._foreach_add_(moving, grads, alpha=-self._rate)

    def _velocities(self, states: list[Any], grads: list[Tensor]) -> list[Tensor]:
        running = [(s[_BUFFER], g) for s, g in zip(states, grads, strict=True) if _BUFFER in s]
        if running:
            velocities = [v for v, _ in running]
            if self._rounds_alike:
                torch._foreach_mul_(velocities, self._momentum)
            else:
                for velocity in velocities:
                    velocity.mul_(self._momentum)
            torch._foreach_add_(velocities, [g for _, g in running], alpha=self._new)
            if len(running) == len(states):
                return velocities
        for state, grad in zip(states, grads, strict=True):
            if _BUFFER not in state:
                state[_BUFFER] = grad.clone()
        return [state[_BUFFER] for state in states]


def _is_plain(optimizer: Optimizer) -> bool:
    hooks = (
        *(getattr(optimizer, f"_optimizer_step_{when}_hooks") for when in ("pre", "post")),
        *(getattr(of_all, f"_global_optimizer_{when}_hooks") for when in ("pre", "post")),
    )
    asked = ("foreach", "fused", "differentiable")
    return (
        type(optimizer) is SGD
        and "step" not in vars(optimizer)  # a scheduler's wrapper, say
        and not any(hooks)
        and not any(group[option] for group in optimizer.param_groups for option in asked)
        and not any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    )


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters by dtype and device, as torch's multi-tensor kernels take them."""
    found: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return list(found.values())
