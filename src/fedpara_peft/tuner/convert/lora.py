"""Conversion of FedPara adapters to LoRA, exactly or at a rank."""

from __future__ import annotations

import os
from typing import cast

from peft import LoraConfig
from torch import nn

from .adapter import convert_adapter
from .folder import config_of


def save_as_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    tolerance: float | None = None,
) -> LoraConfig:
    """Write an adapter as the PEFT LoRA that it exactly is, or as the best one of a rank.

        FedPara of rank r is a LoRA of rank r², pFedPara one of r² + r, low-rank one of r.

    The folder needs neither this package nor the factors: any LoRA server loads it. A pFedPara
    adapter is written as the personal model, with its local half in it: it is private.
    :func:`~.adapter.convert_adapter` does the same and says the error of each layer.

    Args:
        model: a model with FedPara adapters over a frozen base.
        folder: where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: the adapter.
        rank: the best LoRA of this rank, layer by layer; None: the exact one.
        tolerance: the best LoRA of the least rank whose relative error is at most this.

    Returns:
        The LoRA's configuration.

    Raises:
        ConversionError: the weights are replaced or activated by tanh, pFedPara's local half is
            missing, the folder holds another method's adapter, or a layer is of a kind that LoRA
            lacks (recurrent; a convolution with groups, dilation or a padding mode).
    """
    config_of(model, folder, adapter_name, "save_as_lora")
    done = convert_adapter(
        model, folder, "lora", rank=rank, tolerance=tolerance, adapter_name=adapter_name
    )
    return cast(LoraConfig, done.config)
