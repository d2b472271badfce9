"""Exact conversions of FedPara adapters to LoRA and LoHa; back from LoHa: ``from_loha.py``.

Nothing is approximated. Where there is no exact form the conversion is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoraConfig, PeftType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..maths.apply import has_low_rank_form, low_rank_form
from ._peft import WRAPPER_PREFIX, is_key_under_prefixes
from .config import FedParaConfig
from .conv import Conv
from .embedding import Embedding
from .errors import ConversionError
from .layer import AdapterSpec, FedParaLayer
from .names import base_names, exact_pattern, saved_name
from .recurrent import Recurrent

#: LoHa's factors in the order of ours: X, Y, T of each half.
LOHA_FACTORS = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))
_INSTEAD = "put it into exclude_modules before training, or use merge_and_unload() instead"


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
    config = _config_of(model, folder, adapter_name, "save_as_lora")
    check_target(folder, PeftType.LORA)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = []
    local_halves = []
    for name, layer, spec in _layers(model, adapter_name):
        if not has_low_rank_form(spec.nonlinearity):
            raise ConversionError(
                f"{name}: tanh has no exact low-rank form; use merge_and_unload() instead"
            )
        _check_lora_kind(name, layer)
        if spec.parameterization == "pfedpara":
            local_halves.append(layer.halves(adapter_name)[1].y)
        tensors = _lora_factors(layer, adapter_name)
        ranks[name] = tensors[0].shape[0]
        first, second = _lora_names(layer)
        state[f"{WRAPPER_PREFIX}{name}.{first}"] = tensors[0]
        state[f"{WRAPPER_PREFIX}{name}.{second}"] = tensors[1]
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
        target_modules=_targets(model, ranks),
        bias={"fedpara_only": "lora_only"}.get(config.bias, config.bias),
        fan_in_fan_out=any(transposed),
        **carried_over(config),
    )
    write_adapter(folder, lora, {**state, **_rest(model, adapter_name)})
    return lora


def save_as_loha(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> LoHaConfig:
    """Write an adapter as the PEFT LoHa that it exactly is; inverse of
    :func:`~.from_loha.loha_to_fedpara`.

    Args:
        model: a model with FedPara adapters over a frozen base.
        folder: where to write the adapter.
        adapter_name: the adapter.

    Returns:
        The LoHa's configuration.

    Raises:
        ConversionError: not ``parameterization="fedpara"`` without tanh over a frozen base, biases
            are trained, the folder holds another method's adapter, or a layer is of a kind that
            LoHa lacks (embedding, recurrent, Conv1D, Conv3d; a convolution with a padding mode).
    """
    config = _config_of(model, folder, adapter_name, "save_as_loha")
    check_target(folder, PeftType.LOHA)
    if config.parameterization != "fedpara" or config.nonlinearity is not None:
        raise ConversionError(
            f"LoHa has no {config.parameterization!r} with nonlinearity={config.nonlinearity!r}: "
            "only parameterization='fedpara' without nonlinearity is the same"
        )
    if config.bias != "none":
        raise ConversionError(f"LoHa trains no biases, the adapter has bias={config.bias!r}")
    state, ranks, alphas = {}, {}, {}
    for name, layer, spec in _layers(model, adapter_name):
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | nn.Conv1d | nn.Conv2d):
            raise ConversionError(f"{name}: LoHa has no form for {type(base).__name__} layers")
        _check_padding_mode(name, base, "LoHa")
        ranks[name] = spec.plans["weight"].r
        alphas[name] = layer.scale_of(adapter_name) * ranks[name]
        for half, names in zip(layer.halves(adapter_name), LOHA_FACTORS, strict=True):
            for key, factor in zip(names, _to_loha(half.x, half.y, half.t), strict=True):
                if factor is not None:
                    state[f"{WRAPPER_PREFIX}{name}.{key}"] = factor
    rank, alpha = max(ranks.values()), max(alphas.values())
    loha = LoHaConfig(
        r=rank,
        alpha=alpha,
        rank_pattern={exact_pattern(n): r for n, r in ranks.items() if r != rank},
        alpha_pattern={exact_pattern(n): a for n, a in alphas.items() if a != alpha},
        target_modules=_targets(model, ranks),
        use_effective_conv2d=config.use_effective_conv2d,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        **carried_over(config),
    )
    write_adapter(folder, loha, {**state, **_rest(model, adapter_name)})
    return loha


def _config_of(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str, called: str
) -> FedParaConfig:
    if not isinstance(model, nn.Module) or not isinstance(adapter_name, str):
        given = ", ".join(type(a).__name__ for a in (model, folder, adapter_name))
        raise ConversionError(
            f"{called}(model, folder, adapter_name='default') was given ({given}): the model goes "
            "first, and no rank, for the conversion is exact; peft.save_as_lora(path, model, rank) "
            "approximates"
        )
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, FedParaConfig):
        raise ConversionError(
            f"the model has no FedPara adapter {adapter_name!r}; it has {sorted(configs)}"
        )
    if config.base_weight == "replaced":
        raise ConversionError(
            "base_weight='replaced' has no base weight that an adapter could be added to: "
            "merge_and_unload() gives the plain model"
        )
    return config


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, FedParaLayer, AdapterSpec]]:
    plain = base_names(model)
    for name, module in model.named_modules():
        if isinstance(module, FedParaLayer) and adapter_name in module.specs:
            yield plain[name], module, module.specs[adapter_name]


def _check_lora_kind(name: str, layer: FedParaLayer) -> None:
    base = layer.get_base_layer()
    if isinstance(layer, Recurrent):
        raise ConversionError(f"{name}: LoRA has no form for recurrent layers")
    if not isinstance(layer, Conv):
        return
    if base.groups != 1:
        raise ConversionError(f"{name}: LoRA has no exact form for grouped convolutions")
    # PEFT builds LoRA's convolutions from kernel size, stride and padding alone.
    if any(d > 1 and k > 1 for d, k in zip(base.dilation, base.kernel_size, strict=True)):
        raise ConversionError(
            f"{name}: PEFT's LoRA convolves without dilation, the layer has "
            f"dilation={base.dilation}; {_INSTEAD}"
        )
    _check_padding_mode(name, base, "LoRA")


def _check_padding_mode(name: str, base: Any, method: str) -> None:
    """PEFT's LoRA and LoHa pad with zeros, whatever the layer does."""
    if getattr(base, "padding_mode", "zeros") == "zeros":
        return
    if any(base._reversed_padding_repeated_twice):  # the padding in numbers, "same" as well
        raise ConversionError(
            f"{name}: PEFT's {method} pads with zeros, the layer has "
            f"padding_mode={base.padding_mode!r}; {_INSTEAD}"
        )


def _targets(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """``target_modules`` that match these layers and no others.

    PEFT takes a listed name for every layer whose name ends in it. Where that is one layer too
    many, the names become a regex, which PEFT matches whole.
    """
    others = set(base_names(model).values()).difference(names)
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name in others):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(names)


def _lora_names(layer: FedParaLayer) -> tuple[str, str]:
    if isinstance(layer, Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


@torch.no_grad()
def _lora_factors(layer: FedParaLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A and B of the LoRA, the scale folded in."""
    spec = layer.specs[adapter_name]
    plan, scale = spec.plans["weight"], layer.scale_of(adapter_name)
    a, b, core = low_rank_form(layer.halves(adapter_name), spec.parameterization)
    if isinstance(layer, Embedding):
        a = a.clone()
        if layer.zero_row is not None:
            a[layer.zero_row] = 0
        return a.T.contiguous(), (scale * b).contiguous()
    down, up = b.T, scale * a
    if isinstance(layer, Conv):
        kernel = plan.shape.kernel
        ones = [1] * len(kernel)
        if core is not None:
            down = torch.einsum("ab...,ib->ai...", core, b)
        down = down.reshape(down.shape[0], plan.shape.in_features, *kernel)
        up = up.reshape(*up.shape, *ones)
    return down.contiguous(), up.contiguous()


def _to_loha(x: Tensor, y: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    x, y = x.detach(), y.detach()
    if t is None:
        return x.clone(), y.T.contiguous(), None
    t = t.detach()
    core = t.unsqueeze(-1) if t.dim() == 3 else t  # LoHa keeps a Conv1d's core as k x 1
    return x.T.contiguous(), y.T.contiguous(), core.clone()


def carried_over(config: Any) -> dict[str, Any]:
    """Settings that every method has."""
    return {
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "modules_to_save": config.modules_to_save,
        "inference_mode": True,
    }


def _rest(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What the adapter saves beside its factors: biases and modules_to_save."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    factors = {
        f"{saved_name(name)}.{container}"
        for name, module in model.named_modules()
        if isinstance(module, FedParaLayer)
        for container in module.adapter_layer_names
    }
    return {k: v for k, v in state.items() if not is_key_under_prefixes(k, factors)}


def write_adapter(folder: str | os.PathLike[str], config: Any, state: dict[str, Tensor]) -> None:
    """Write an adapter's two files; safetensors takes contiguous tensors that share no memory."""
    if any(tensor.is_meta for tensor in state.values()):
        raise ConversionError("the adapter is on the meta device, which holds no values: load one")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    own = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
    save_file(own, path / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def check_target(folder: str | os.PathLike[str], method: PeftType) -> None:
    """Refuse a folder with another method's adapter: the very one to convert, most likely."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())["peft_type"]
    except (ValueError, KeyError, TypeError):
        found = "adapter that cannot be read"
    if found != method.value:
        raise ConversionError(
            f"{folder} holds a {found}, which would be overwritten: give another folder"
        )
