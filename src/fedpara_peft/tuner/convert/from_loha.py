"""Exact conversion of a LoHa adapter to FedPara, without a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoHaConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .._peft import FEDPARA, WRAPPER_PREFIX, get_pattern_key
from ..config import FedParaConfig
from ..errors import ConversionError
from ..kinds.product import LOHA_FACTORS
from ..layer import half_containers
from ..names import exact_pattern
from .folder import carried_over, check_target, write_adapter


def loha_to_fedpara(
    source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> FedParaConfig:
    """Rewrite a PEFT LoHa folder as the FedPara folder that it exactly is; no model is needed.

    Two things are not in a LoHa's folder. A convolution with a ``padding_mode``: PEFT's LoHa pads
    its own part with zeros there until it is merged, FedPara pads as the layer does, so the result
    is the merged LoHa. And what training goes on with: FedPara divides what ``rank_dropout`` keeps
    by ``1 - rank_dropout``, PEFT's LoHa by the share that was kept.

    Args:
        source: folder with a LoHa's ``adapter_config.json`` and ``adapter_model.safetensors``.
        target: where to write the FedPara adapter.

    Returns:
        The FedPara configuration.

    Raises:
        ConversionError: the source does not hold a LoHa in safetensors, or one that PEFT itself
            cannot load, or the target holds another method's adapter.
    """
    check_target(target, FEDPARA)
    path = Path(source) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ConversionError(f"no {SAFETENSORS_WEIGHTS_NAME} in {source}: save the LoHa with PEFT")
    loha = LoHaConfig.from_pretrained(source)
    if not isinstance(loha, LoHaConfig):
        raise ConversionError(f"{source} holds a {loha.peft_type}, not a LoHa")
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ConversionError(f"{path} cannot be read ({error}): save or fetch it again") from None
    _check_factors(source, saved)
    state: dict[str, Tensor] = {}
    ours = dict(zip(sum(LOHA_FACTORS, ()), half_containers(0) + half_containers(1), strict=True))
    for key, tensor in saved.items():
        module, _, factor = key.rpartition(".")
        if factor not in ours:
            state[key] = tensor
            continue
        has_core = f"{module}.hada_t1" in saved
        state[f"{module}.{ours[factor]}.weight"] = _from_loha(factor, tensor, has_core)
    ranks, alphas = _patterns_of(loha, saved)
    config = FedParaConfig(
        r=loha.r,
        alpha=loha.alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=loha.target_modules,
        exclude_modules=loha.exclude_modules,
        layers_to_transform=loha.layers_to_transform,
        layers_pattern=loha.layers_pattern,
        use_effective_conv2d=loha.use_effective_conv2d,
        rank_dropout=loha.rank_dropout,
        module_dropout=loha.module_dropout,
        **carried_over(loha),
    )
    write_adapter(target, config, state)
    return config


def _check_factors(source: str | os.PathLike[str], saved: Mapping[str, Tensor]) -> None:
    layers: dict[str, dict[str, int]] = {}
    for key, tensor in saved.items():
        name, _, factor = key.rpartition(".")
        if factor in sum(LOHA_FACTORS, ()):
            layers.setdefault(name, {})[factor] = tensor.dim()
    if not layers:
        raise ConversionError(f"{source} has no LoHa factors in it: save the LoHa with PEFT")
    for name, dims in layers.items():
        cores = {factor for factor in dims if factor.startswith("hada_t")}
        whole = len(dims) - len(cores) == 4 and len(cores) in (0, 2)
        if not whole or any((d < 3) if f in cores else (d != 2) for f, d in dims.items()):
            raise ConversionError(f"{name}: its factors in {source} are damaged: save it again")


def _patterns_of(
    loha: LoHaConfig, saved: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of the layers that have their own, as PEFT reads them from the file.

    PEFT takes the first pattern that matches, in the order of the file.
    """
    ranks, alphas = {}, {}
    for key, tensor in saved.items():
        name, _, factor = key.removeprefix(WRAPPER_PREFIX).rpartition(".")
        if factor != "hada_w1_b":
            continue
        r = _first_of(loha.rank_pattern, name, loha.r)
        if r != tensor.shape[0]:
            raise ConversionError(
                f"{name} has rank {tensor.shape[0]}, but {r} by the first of the patterns "
                f"{sorted(loha.rank_pattern or {})} that matches, by which PEFT goes: it does not "
                "load this LoHa either; save it with patterns that do not overlap"
            )
        ranks[exact_pattern(name)] = r
        alphas[exact_pattern(name)] = _first_of(loha.alpha_pattern, name, loha.alpha)
    return (
        {n: r for n, r in ranks.items() if r != loha.r},
        {n: a for n, a in alphas.items() if a != loha.alpha},
    )


def _first_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    try:
        return (patterns or {}).get(get_pattern_key(list(patterns or {}), name), default)
    except re.error as error:
        raise ConversionError(f"{patterns} has a pattern that is no regex ({error})") from None


def _from_loha(factor: str, tensor: Tensor, has_core: bool) -> Tensor:
    if factor.startswith("hada_t"):
        return tensor.contiguous()  # a Conv1d's core is k x 1 here; loading knows the layer
    if factor.endswith("_b") or has_core:
        return tensor.T.contiguous()
    return tensor.contiguous()
