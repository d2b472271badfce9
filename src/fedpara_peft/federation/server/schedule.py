"""Which communicated tensors a round trains.

Averaging the factors of a product is not averaging the products: with W = (X₁Y₁ᵀ) ⊙ (X₂Y₂ᵀ) the
mean of the factors composes to another weight than the mean of the weights. While only one factor
of every product changes in a round, W is linear in what changes, and both means agree (not with
tanh, which is told to the log). The others rest, so they need not be sent up either.
"""

from __future__ import annotations

import logging

from torch import nn

from ...tuner.layer import factorized_weights
from ...tuner.scope import tensor_scopes
from ..errors import ArgumentsError

logger = logging.getLogger(__name__)


def factor_blocks(model: nn.Module, schedule: str = "one_block") -> list[list[str]]:
    """The global factors of every product, by block: the names that change together.

    Args:
        model: a model with FedPara adapters.
        schedule: ``factor_schedule``; with ``"all"`` nothing takes turns.

    Returns:
        For each factorized weight its blocks in the order X₁, Y₁, (T₁,) X₂, Y₂, (T₂).

    Raises:
        ArgumentsError: the model has no factorized weights.
    """
    if schedule == "all":
        return []
    names = {id(p): name for name, p in model.named_parameters()}
    shared = {name for name, scope in tensor_scopes(model).items() if scope == "global"}
    products = []
    curved = set()
    for weight in factorized_weights(model):
        if weight.spec.nonlinearity is not None:
            curved.add(f"{weight.spec.nonlinearity!r}")
        if not weight.spec.form.is_multilinear:
            curved.add(f"{weight.spec.form.name!r}, which multiplies a half with itself")
        found = [names[id(factor)] for half in weight.halves for factor in half.tensors()]
        products.append([name for name in found if name in shared])
    products = [p for p in products if p]
    if not products:
        raise ArgumentsError(
            "factor_schedule='one_block' needs trainable FedPara adapters: the model has none"
        )
    if curved:
        logger.warning(
            "factor_schedule='one_block' averages weights exactly only where a weight is linear in "
            "each factor, the model has %s: measure what is left with report_averaging_bias=True, "
            "or use nonlinearity=None",
            " and ".join(sorted(curved)),
        )
    return products


def resting_factors(products: list[list[str]], round: int) -> set[str]:
    """The factors that do not change in a round, counted from 0: all but one of every product."""
    return {
        name
        for factors in products
        for position, name in enumerate(factors)
        if position != round % len(factors)
    }
