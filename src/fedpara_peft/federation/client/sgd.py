"""A client's step: the strategy's correction of its gradients, and SGD."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...comm.state import State
from ..arguments import FederatedArguments
from ..strategies import Correction
from .step_weights import StepWeights, clip_scale


class SGD:
    """torch's SGD, bit for bit, without what its class does around every step.

    g ← g + λ w,   v ← β v + g,   w ← w - η v
    """

    def __init__(
        self, parameters: list[nn.Parameter], rate: float, momentum: float, weight_decay: float
    ) -> None:
        self._parameters = parameters
        self._rate, self._momentum, self._weight_decay = rate, momentum, weight_decay
        self._velocity: dict[Tensor, Tensor] = {}

    def step(self) -> None:
        """Move the parameters that have gradients."""
        pairs = [(p, p.grad) for p in self._parameters if p.grad is not None]
        if not pairs:
            return
        moving: list[Tensor] = [p for p, _ in pairs]
        steps = [g for _, g in pairs]
        with torch.no_grad():
            if self._weight_decay:
                steps = list(torch._foreach_add(steps, moving, alpha=self._weight_decay))
            if self._momentum:
                steps = self._velocities(moving, steps)
            torch._foreach_add_(moving, steps, alpha=-self._rate)

    def _velocities(self, moving: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
        for parameter, step in zip(moving, steps, strict=True):
            if parameter in self._velocity:
                self._velocity[parameter].mul_(self._momentum).add_(step)
            else:
                self._velocity[parameter] = step.clone()
        return [self._velocity[p] for p in moving]


class Corrector:
    """Applies a strategy's correction to the gradients, in place.

    A parameter that the loss did not reach has the gradient 0, to which the correction is added all
    the same: the strategy's term of the objective depends on it.
    """

    def __init__(
        self, correction: Correction | None, parameters: Mapping[str, nn.Parameter], start: State
    ) -> None:
        self._pull = correction.pull if correction else 0.0
        offset = (correction.offset if correction else None) or {}
        self._pulled = [(p, start[n]) for n, p in parameters.items()] if self._pull else []
        self._offset = [(p, offset[n]) for n, p in parameters.items() if n in offset]

    def __call__(self) -> None:
        """Correct the gradients."""
        for parameter, fixed in self._pulled:
            _gradient(parameter).add_(parameter.detach() - fixed, alpha=self._pull)
        for parameter, fixed in self._offset:
            _gradient(parameter).add_(fixed)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class StackedSGD:
    """The same for every client of a stack, ``(clients, …)``, in the same order of operations."""

    def __init__(
        self,
        stack: State,
        start: State,
        corrections: Sequence[Correction | None],
        args: FederatedArguments,
    ) -> None:
        self._args = args
        self._start = start
        first = corrections[0]
        self._pull = first.pull if first else 0.0
        offsets = [(c.offset if c else None) or {} for c in corrections]
        self._offset = {
            n: torch.stack([o[n] if n in o else torch.zeros_like(stack[n][0]) for o in offsets])
            for n in {name for offset in offsets for name in offset}
        }
        self._velocity: State = {}
        self.weights = StepWeights(args.momentum)

    def step(self, stack: State, grads: State, rate: float, made: Tensor | None = None) -> State:
        """The stack after a step.

        Args:
            stack: every client's tensors.
            grads: gradients of those that have one; of the others those that a correction moves
                have 0, and the rest stay where they are.
            rate: learning rate.
            made: which clients make this step; None: all.
        """
        args = self._args
        found = {
            name: self._corrected(name, value, grads.get(name))
            for name, value in stack.items()
            if name in grads or name in self._offset or (self._pull and name in self._start)
        }
        if args.max_grad_norm is not None and found:
            squares = [g.flatten(1).square().sum(1) for g in found.values()]
            norms = functools.reduce(torch.add, squares).sqrt()
            scale = clip_scale(norms, args.max_grad_norm)
            found = {n: g * scale.view(-1, *[1] * (g.dim() - 1)) for n, g in found.items()}
            self.weights.step(scale, made)
        else:
            self.weights.step(made=made)
        if args.weight_decay:
            found = {n: g.add(stack[n], alpha=args.weight_decay) for n, g in found.items()}
        if args.momentum:
            before = self._velocity
            found = {
                n: before[n] * args.momentum + g if n in before else g for n, g in found.items()
            }
            kept = {n: before.get(n, torch.zeros_like(v)) for n, v in found.items()}
            self._velocity = {**before, **_where(made, found, kept)}
        moved = {n: stack[n].add(v, alpha=-rate) for n, v in found.items()}
        return {**stack, **_where(made, moved, stack)}

    def _corrected(self, name: str, value: Tensor, grad: Tensor | None) -> Tensor:
        grad = torch.zeros_like(value) if grad is None else grad
        if self._pull and name in self._start:
            grad = grad.add(value - self._start[name], alpha=self._pull)
        return grad + self._offset[name] if name in self._offset else grad


def _where(made: Tensor | None, new: State, old: State) -> State:
    if made is None:
        return new
    return {n: torch.where(made.view(-1, *[1] * (v.dim() - 1)), v, old[n]) for n, v in new.items()}
