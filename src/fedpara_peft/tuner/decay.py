"""Weight decay of the composed weights: of the product rather than of its factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .layer import FactorizedWeight, factorized_weights


def composed_weight_decay(model: nn.Module, strength: float) -> Tensor:
    """Regularizer that any training loop can add to its loss.

        R = (λ/2) Σ_weights ‖W‖²_F

    W is what a dense model would decay in its place: the composed weight from scratch (with a
    seeded base in it), ``s ΔW`` beside a frozen base. Decay of the factors is another prior: for
    two factors that of the nuclear norm, for the four of FedPara a still sparser one.

    Args:
        model: with FedPara layers; of several adapters the active ones decay.
        strength: λ.

    Returns:
        R, a scalar, of float64 factors in float64 and of all others in float32.

    Raises:
        ConfigError: the model has no active FedPara weight.

    Example:
        >>> (loss + composed_weight_decay(model, 1e-4)).backward()         # doctest: +SKIP
    """
    squares = [
        _at_least_float32(_decayed(found)).square().sum()
        for found in factorized_weights(model)
        if found.adapter in found.layer.active_adapters
    ]
    if not squares:
        raise ConfigError(
            "composed_weight_decay: the model has no active FedPara weight to decay: use "
            "weight_decay, or give the model an adapter"
        )
    first = squares[0]
    return strength / 2 * torch.stack([s.to(first.device, first.dtype) for s in squares]).sum()


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _decayed(found: FactorizedWeight) -> Tensor:
    if found.spec.base_weight == "seeded":
        return found.layer.effective_weight(found.weight)
    return found.layer.get_delta_weight(found.adapter, found.weight)
