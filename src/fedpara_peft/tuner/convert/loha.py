"""Exact conversion of FedPara adapters to LoHa."""

from __future__ import annotations

import os

from peft import LoHaConfig, PeftType
from torch import Tensor, nn

from ...maths.parameterizations import FEDPARA
from .._peft import WRAPPER_PREFIX
from ..errors import ConversionError
from ..layer import factorized_layers
from ..names import base_names, exact_pattern
from .folder import carried_over, check_target, config_of, rest_of, targets_of, write_adapter


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
    config = config_of(model, folder, adapter_name, "save_as_loha")
    check_target(folder, PeftType.LOHA)
    if config.form.terms != FEDPARA.terms or config.nonlinearity is not None:
        raise ConversionError(
            f"LoHa has no {config.parameterization!r} with nonlinearity={config.nonlinearity!r}: "
            "only parameterization='fedpara' without nonlinearity is the same"
        )
    if config.bias != "none":
        raise ConversionError(f"LoHa trains no biases, the adapter has bias={config.bias!r}")
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    plain = base_names(model)
    for module_name, layer in factorized_layers(model, adapter_name):
        name = plain[module_name]
        factors = layer.loha_factors(adapter_name, name)
        ranks[name] = layer.specs[adapter_name].plans["weight"].r
        alphas[name] = layer.scale_of(adapter_name) * ranks[name]
        state.update({f"{WRAPPER_PREFIX}{name}.{n}": f for n, f in factors.items()})
    rank, alpha = max(ranks.values()), max(alphas.values())
    loha = LoHaConfig(
        r=rank,
        alpha=alpha,
        rank_pattern={exact_pattern(n): r for n, r in ranks.items() if r != rank},
        alpha_pattern={exact_pattern(n): a for n, a in alphas.items() if a != alpha},
        target_modules=targets_of(model, ranks),
        use_effective_conv2d=config.use_effective_conv2d,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        **carried_over(config),
    )
    write_adapter(folder, loha, {**state, **rest_of(model, adapter_name)})
    return loha
