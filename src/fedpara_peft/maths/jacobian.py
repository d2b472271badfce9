"""Jacobian correction: pull the factors' step toward the dense weight's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .halves import Half
from .precision import as_given


def jacobian_penalty(
    recompose: Callable[[Sequence[Half]], Tensor],
    halves: Sequence[Half],
    gradient: Tensor,
    learning_rate: float,
) -> Tensor:
    """Distance between the weight after one factor step and after one dense step.

        R = ½ ‖W' - (W - η J_W)‖²_F        appendix of arXiv:2108.06098

    ``W'`` is composed from the factors after one SGD step of size η. ``J_W = ∂L/∂W`` and the
    target ``W - η J_W`` are held constant; the factor steps are differentiated. In the weight's
    dtype, under autocast too: half precision would round a small step away.

    Args:
        recompose: from halves to the weight W.
        halves: the factors, with ``requires_grad``.
        gradient: J_W, of W's shape.
        learning_rate: η.

    Returns:
        R, a scalar that can be differentiated with respect to the factors.
    """
    with as_given(gradient.device):
        return _penalty(recompose, halves, gradient, learning_rate)


def _penalty(
    recompose: Callable[[Sequence[Half]], Tensor],
    halves: Sequence[Half],
    gradient: Tensor,
    learning_rate: float,
) -> Tensor:
    factors = [factor for half in halves for factor in half.tensors()]
    weight = recompose(halves)
    gradient = gradient.detach().to(weight.dtype)
    target = (weight - learning_rate * gradient).detach()
    steps = torch.autograd.grad(weight, factors, gradient, create_graph=True)
    stepped = iter([f - learning_rate * step for f, step in zip(factors, steps, strict=True)])
    after = [
        Half(next(stepped), next(stepped), None if half.t is None else next(stepped))
        for half in halves
    ]
    return (recompose(after) - target).square().sum() / 2
