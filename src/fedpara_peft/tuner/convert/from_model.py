"""The layers of a live model with FedPara adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...maths.apply import has_low_rank_form
from ...maths.halves import Half
from ...maths.parameterizations import LOWRANK
from ..errors import ConversionError
from ..kinds import Conv, Embedding, Linear
from ..layer import FedParaLayer, factorized_layers
from ..names import base_names
from .layouts.keys import LOHA
from .layouts.layer import Layer, loha_half

#: The kinds whose forms are those of their halves.
_KINDS: tuple[type[FedParaLayer], ...] = (Linear, Conv, Embedding)


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
        if layer.remainder(adapter_name, next(iter(spec.plans))) is not None:
            raise ConversionError(
                f"{name}: its remainder is dense, which neither LoRA nor LoHa holds; use "
                "merge_and_unload() instead"
            )
        with torch.no_grad():
            method = f"{to}_factors"
            given = getattr(layer, method)(adapter_name, name)
            given = {n: _at_hand(factor) for n, factor in given.items()}
            known = getattr(type(layer), method) in [getattr(kind, method) for kind in _KINDS]
            yield _layer(layer, adapter_name, name, None if known else given)


def _layer(
    layer: FedParaLayer, adapter_name: str, name: str, given: dict[str, Tensor] | None
) -> Layer:
    """A layer by its halves, or by the factors that a kind of another's making gives."""
    spec = layer.specs[adapter_name]
    plan = spec.plans["weight"]
    kernel = tuple(plan.shape.kernel)
    rank, alpha = plan.r, layer.scale_of(adapter_name) * plan.r
    form, embedding = spec.parameterization, layer.kind == "embedding"
    if given is not None and "hada_w1_a" not in given:
        form, embedding = LOWRANK.name, "lora_embedding_A" in given
        down, up = _lora_pair(name, given)
        halves: tuple[Half, ...] = (Half(up.flatten(1), down.flatten(1).T),)
        if embedding:  # rows are looked up in down
            halves = (Half(down.T, up),)
        rank, kernel = down.shape[0], tuple(down.shape[2:])
        alpha = float(rank)
    elif given is not None:
        halves = tuple(loha_half(given, names, len(kernel)) for names in LOHA)
    else:
        halves = tuple(
            Half(_at_hand(x), _at_hand(y), None if t is None else _at_hand(t))
            for x, y, t in layer.halves(adapter_name)
        )
        if layer.zero_row is not None:  # the padding row: nothing is added there
            row = torch.tensor([layer.zero_row], device=halves[0].x.device)
            halves = tuple(half._replace(x=half.x.index_fill(0, row, 0)) for half in halves)
    return Layer(
        name=name,
        component="",
        underscored=False,
        parameterization=form,
        halves=halves,
        rank=rank,
        alpha=alpha,
        kernel=kernel,
        embedding=embedding,
        transposed=layer.transposed,
    )


def _at_hand(factor: Tensor) -> Tensor:
    """A factor's values, on a device that has float64."""
    if factor.is_meta:
        raise ConversionError("the adapter is on the meta device, which holds no values: load one")
    return factor.detach() if factor.device.type in ("cpu", "cuda") else factor.detach().cpu()


def _lora_pair(name: str, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        if given.keys() == {down, up}:
            return given[down], given[up]
    raise ConversionError(
        f"{name}: its kind's lora_factors gives {', '.join(given)}, and LoRA's are lora_A.weight "
        "and lora_B.weight, or lora_embedding_A and lora_embedding_B"
    )
