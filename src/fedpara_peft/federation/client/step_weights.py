"""What the gradients of a client's steps weigh in its update."""

from __future__ import annotations

import torch
from torch import Tensor


class StepWeights:
    """Sums the weights a_k of SGD's gradients, w_t - y = η Σ_k a_k g_k, step by step.

        v ← β v + s,   Σ a ← Σ a + v

    This is SGD itself on a number whose gradient is 1 (s where the step's gradients were scaled by
    s to clip them): with momentum β and K steps it is [K - β (1 - β^K) / (1 - β)] / (1 - β), the
    l1 norm of arXiv:2007.07481.

    Args:
        momentum: β.

    Attributes:
        total: Σ a so far; of stacked clients one a client, ``(clients,)``.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._velocity: Tensor | float = 0.0
        self.total: Tensor | float = 0.0

    def step(self, scale: Tensor | float = 1.0, made: Tensor | None = None) -> None:
        """Count a step.

        Args:
            scale: what its gradients were scaled by.
            made: which clients of a stack make this step; None: all.
        """
        velocity = self._momentum * self._velocity + scale if self._momentum else scale
        if made is None:
            self._velocity, self.total = velocity, self.total + velocity
            return
        new, old = (torch.as_tensor(v, dtype=torch.float64) for v in (velocity, self._velocity))
        self._velocity = torch.where(made, new, old)
        self.total = self.total + torch.where(made, new, 0.0)


def clip_scale(norm: Tensor, max_grad_norm: float) -> Tensor:
    """What ``clip_grad_norm_`` multiplies gradients of a norm by."""
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
