"""Exact conversion of FedPara adapters to LoRA."""

from __future__ import annotations

import os

import torch
from peft import LoraConfig, PeftType
from torch import Tensor, nn

from ...maths.apply import has_low_rank_form
from .._peft import WRAPPER_PREFIX
from ..errors import ConversionError
from ..layer import factorized_layers
from ..names import base_names, exact_pattern
from .folder import carried_over, check_target, config_of, rest_of, targets_of, write_adapter


def save_as_lora(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> LoraConfig:
    """Write an adapter as the PEFT LoRA that it exactly is.

        FedPara of rank r is a LoRA of rank r², pFedPara one of r² + r, low-rank one of r.

    The folder needs neither this package nor the factors: any LoRA server loads it. A pFedPara
    adapter is written as the personal model, with its local half in it: it is private.

    Args:
        model: a model with FedPara adapters over a frozen base.
        folder: where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: the adapter.

    Returns:
        The LoRA's configuration.

    Raises:
        ConversionError: the weights are replaced or activated by tanh, pFedPara's local half is
            missing, the folder holds another method's adapter, or a layer is of a kind that LoRA
            lacks (recurrent; a convolution with groups, dilation or a padding mode).
    """
    config = config_of(model, folder, adapter_name, "save_as_lora")
    check_target(folder, PeftType.LORA)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = []
    local_halves = []
    plain = base_names(model)
    for module_name, layer in factorized_layers(model, adapter_name):
        name, spec = plain[module_name], layer.specs[adapter_name]
        if not has_low_rank_form(spec.nonlinearity):
            raise ConversionError(
                f"{name}: tanh has no exact low-rank form; use merge_and_unload() instead"
            )
        with torch.no_grad():
            factors = layer.lora_factors(adapter_name, name)
        for half in spec.form.local_halves:
            local_halves.append(layer.halves(adapter_name)[half].y)
        ranks[name] = next(iter(factors.values())).shape[0]
        state.update({f"{WRAPPER_PREFIX}{name}.{n}": f for n, f in factors.items()})
        transposed.append(layer.transposed)
    if local_halves and not any(bool(y.any()) for y in local_halves):
        raise ConversionError(
            "the adapter has no personal half (W₂ = 0 everywhere): load_local(model, folder) first"
        )
    rank = max(ranks.values())
    patterns = {exact_pattern(n): r for n, r in ranks.items() if r != rank}
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        target_modules=targets_of(model, ranks),
        bias={"fedpara_only": "lora_only"}.get(config.bias, config.bias),
        fan_in_fan_out=any(transposed),
        **carried_over(config),
    )
    write_adapter(folder, lora, {**state, **rest_of(model, adapter_name)})
    return lora
