"""Chances of an adapter's dropout, from torch's global generator."""

import torch
from torch import Tensor


def chance(p: float) -> bool:
    """Whether something of probability p happens; nothing is drawn at 0."""
    return p > 0 and bool(torch.rand(()) < p)


def inverted_mask(like: Tensor, size: int, p: float) -> Tensor:
    """Keep with probability 1 - p, scaled by 1 / (1 - p): right in the mean, 0 when all drop."""
    if p == 1:
        return like.new_zeros(size)
    return torch.empty(size, dtype=like.dtype, device=like.device).bernoulli_(1 - p) / (1 - p)
