"""Walking over what is factorized in a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ...maths.compose import Half
from ..plan import WeightPlan
from .base import FedParaLayer
from .factors import AdapterSpec
from .remainder import REMAINDER_CONTAINER


class FactorizedWeight(NamedTuple):
    """One weight of one adapter.

    Attributes:
        name: the layer's name in the model.
        layer: the layer.
        adapter: the adapter's name.
        weight: the weight's name in the layer.
        plan: how it is factorized.
    """

    name: str
    layer: FedParaLayer
    adapter: str
    weight: str
    plan: WeightPlan

    @property
    def spec(self) -> AdapterSpec:
        """The adapter's settings on the layer."""
        return self.layer.specs[self.adapter]

    @property
    def base_name(self) -> str:
        """What ``state_dict()`` calls the weight beside the factors, where there is one."""
        return f"{self.name}.base_layer.{self.weight}".removeprefix(".")

    @property
    def remainder_name(self) -> str:
        """What ``state_dict()`` calls its remainder, where it has one."""
        return f"{self.name}.{REMAINDER_CONTAINER}.{self.adapter}.{self.weight}".removeprefix(".")

    @property
    def halves(self) -> tuple[Half, ...]:
        """The factors, half by half."""
        return self.layer.halves(self.adapter, self.weight)


def factorized_layers(
    model: nn.Module, adapter: str | None = None, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, FedParaLayer]]:
    """The factorized layers of a model, by name.

    Args:
        model: any module.
        adapter: only the layers that have this adapter.
        remove_duplicate: give a layer that modules share under its first name alone.
    """
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, FedParaLayer) and (adapter is None or adapter in module.specs):
            yield name, module


def factorized_weights(model: nn.Module, adapter: str | None = None) -> Iterator[FactorizedWeight]:
    """The factorized weights of a model, layer by layer, of one adapter or of all."""
    for name, layer in factorized_layers(model, adapter):
        for own, spec in layer.specs.items():
            if adapter in (None, own):
                for weight, plan in spec.plans.items():
                    yield FactorizedWeight(name, layer, own, weight, plan)
