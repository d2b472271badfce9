"""Exact conversion of FedPara adapters to LoHa."""

from __future__ import annotations

import os
from typing import cast

from peft import LoHaConfig
from torch import nn

from .adapter import convert_adapter
from .folder import config_of


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
    config_of(model, folder, adapter_name, "save_as_loha")
    return cast(
        LoHaConfig, convert_adapter(model, folder, "loha", adapter_name=adapter_name).config
    )
