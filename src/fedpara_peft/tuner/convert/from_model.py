"""The layers of a live model with FedPara adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ...maths.apply import has_low_rank_form
from ...maths.halves import Half
from ..errors import ConversionError
from ..layer import FedParaLayer, factorized_layers
from ..names import base_names
from .layouts.layer import Layer


def model_layers(model: nn.Module, adapter_name: str, to: str) -> Iterator[Layer]:
    """The layers of an adapter; each layer kind answers for the method that it is to become.

    Args:
        model: a model with FedPara adapters over a frozen base.
        adapter_name: the adapter.
        to: ``"lora"`` or ``"loha"``.

    Raises:
        ConversionError: a layer has no form in that method.
    """
    plain = base_names(model)
    for module_name, layer in factorized_layers(model, adapter_name):
        name, spec = plain[module_name], layer.specs[adapter_name]
        if not has_low_rank_form(spec.nonlinearity):
            raise ConversionError(
                f"{name}: tanh has no exact low-rank form; use merge_and_unload() instead"
            )
        with torch.no_grad():
            if to == "lora":
                layer.lora_factors(adapter_name, name)
            else:
                layer.loha_factors(adapter_name, name)
            yield _layer(layer, adapter_name, name)


def _layer(layer: FedParaLayer, adapter_name: str, name: str) -> Layer:
    spec = layer.specs[adapter_name]
    plan = spec.plans["weight"]
    halves = tuple(
        Half(x.detach(), y.detach(), None if t is None else t.detach())
        for x, y, t in layer.halves(adapter_name)
    )
    zero_row = getattr(layer, "zero_row", None)
    if zero_row is not None:  # the padding row: nothing is added there
        x = halves[0].x.clone()
        x[zero_row] = 0
        halves = (halves[0]._replace(x=x), *halves[1:])
    return Layer(
        name=name,
        component="",
        underscored=False,
        parameterization=spec.parameterization,
        halves=halves,
        rank=plan.r,
        alpha=layer.scale_of(adapter_name) * plan.r,
        kernel=tuple(plan.shape.kernel),
        embedding=layer.kind == "embedding",
        transposed=layer.transposed,
    )
