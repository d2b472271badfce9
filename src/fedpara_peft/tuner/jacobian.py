"""Jacobian correction for a model with FedPara layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..maths.jacobian import jacobian_penalty
from .errors import ConfigError
from .layer import ComposedWeight, factorized_layers


@contextmanager
def composed_weights(model: nn.Module) -> Iterator[dict[str, ComposedWeight]]:
    """Collect the composed weights of the forward pass inside the block, by layer name.

    While it is open every layer composes its weight (no faster path is taken) and reuses it if it
    is called again, so that the loss's gradient with respect to the composed weight exists. One
    block is for one loss: open a new one after the factors have changed.
    """
    found: dict[str, ComposedWeight] = {}
    layers = list(factorized_layers(model))
    try:
        for name, layer in layers:
            layer._recording = (name, found)
        yield found
    finally:
        for _, layer in layers:
            layer._recording = None


def jacobian_correction(
    loss: Tensor,
    composed: Mapping[str, ComposedWeight],
    learning_rate: float,
    strength: float = 1.0,
) -> Tensor:
    """Regularizer that any training loop can add to its loss.

        R = (λ/2) Σ_layers ‖W' - (W - η J_W)‖²_F

    See :func:`~fedpara_peft.maths.jacobian.jacobian_penalty`.

    Args:
        loss: the loss L; its graph is kept.
        composed: the composed weights of the forward pass, from
            :func:`composed_weights`.
        learning_rate: η, the optimizer's.
        strength: λ.

    Returns:
        R, a scalar.

    Raises:
        ConfigError: no composed weight took part in the loss.

    Example:
        >>> with composed_weights(model) as composed:                       # doctest: +SKIP
        ...     loss = loss_function(model(x), y)
        ...     (loss + jacobian_correction(loss, composed, 0.1)).backward()
    """
    records = [c for c in composed.values() if c.weight.requires_grad]
    gradients = (
        torch.autograd.grad(loss, [c.weight for c in records], retain_graph=True, allow_unused=True)
        if records
        else ()
    )
    used = [(c, g) for c, g in zip(records, gradients, strict=True) if g is not None]
    if not used:
        raise ConfigError(
            "no composed weight took part in the loss: compute it inside "
            "`with composed_weights(model) as composed:` with trainable FedPara layers"
        )
    terms = [jacobian_penalty(c.recompose, c.halves, g, learning_rate) for c, g in used]
    return strength * torch.stack([term.to(loss.dtype) for term in terms]).sum()
