"""Starts that the package has not, or has no longer: what they were measured beside stays here."""

from __future__ import annotations

import torch
from torch import nn

from fedpara_peft.tuner.layer import factorized_weights

from .cells import EQUAL, ZERO_Y


def start(model: nn.Module, adapter: str) -> None:
    """Draw the factors anew where the adapter's name says so."""
    if adapter.startswith(EQUAL):
        equal(model)
    elif adapter.endswith(ZERO_Y):
        zero_y(model)


@torch.no_grad()
def equal(model: nn.Module) -> None:
    """All factors of one variance, r² σ⁶ = 2r / 3N: the first step is LoRA's; Y₂ is zero."""
    for found in factorized_weights(model):
        first, second = found.halves
        n, r = second.y.shape
        for factor in (first.x, first.y, second.x):
            factor.normal_(0, (2 / (3 * n * r)) ** (1 / 6))
        second.y.zero_()


@torch.no_grad()
def zero_y(model: nn.Module) -> None:
    """X₂ drawn as Y₂ was, and Y₂ zero in its place."""
    for found in factorized_weights(model):
        _, second = found.halves
        second.x.normal_(0, float(second.y.square().mean().sqrt()))
        second.y.zero_()
