"""Exact conversion of a PEFT LoHa to FedPara, without a model."""

from __future__ import annotations

import os
from typing import cast

from ..config import FedParaConfig
from .adapter import convert_adapter
from .peft_folder import PeftLoHa


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
    PeftLoHa(source)
    return cast(FedParaConfig, convert_adapter(source, target, "fedpara").config)
