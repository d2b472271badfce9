"""Where the factors of a model have their inner rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .layer import factorized_weights


@dataclass(frozen=True)
class Columns:
    """The columns of one factor.

    Attributes:
        r: how many it has, the inner rank.
        dims: the dimensions that run over them: the last of X ``(M, r)`` and Y ``(N, r)``, the
            first two of a core T ``(r, r, *kernel)``.
        weight: the layer, adapter and weight that it is a factor of.
        base_weight: what the factors are beside, see :class:`~.config.FedParaConfig`.
        trains: whether the factor is trained.
    """

    r: int
    dims: tuple[int, ...]
    weight: tuple[str, str, str]
    base_weight: str
    trains: bool


def factor_columns(model: nn.Module) -> dict[str, Columns]:
    """The columns of every factor of a model's adapters, by the factor's name.

    A weight keeps its meaning when the columns beyond some number are left out of all its factors:
    each of its halves is then the half of that lower rank. Setting them to zero is the same, and
    they stay zero: a column of X has the gradient ``G y`` and its partner ``Gᵀ x``, so a pair of
    zeros moves neither.

    Args:
        model: a model with FedPara adapters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for weight in factorized_weights(model):
        for half in weight.halves:
            for factor, dims in zip(half, ((1,), (1,), (0, 1)), strict=True):
                if factor is not None:
                    found[names[id(factor)]] = Columns(
                        weight.plan.r,
                        dims,
                        (weight.name, weight.adapter, weight.weight),
                        weight.spec.base_weight,
                        factor.requires_grad,
                    )
    return found
