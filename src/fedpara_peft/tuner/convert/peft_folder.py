"""A folder with a LoHa that PEFT saved: its configuration has what its keys do not say."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoHaConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .._peft import FEDPARA, get_pattern_key
from ..errors import ConversionError
from .folder import carried_over
from .layouts.source import FoundLayer


class PeftLoHa:
    """The configuration of a PEFT LoHa.

    Args:
        folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ConversionError: it holds another method's adapter, or none in safetensors.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
        if not self.path.is_file():
            raise ConversionError(
                f"no {SAFETENSORS_WEIGHTS_NAME} in {folder}: save the LoHa with PEFT"
            )
        try:
            config: Any = PeftConfig.from_pretrained(str(folder))
        except Exception as error:  # whatever PEFT makes of a file that is none of its own
            raise ConversionError(f"{folder}/{CONFIG_NAME} cannot be read: {error}") from None
        if config.peft_type == FEDPARA:
            raise ConversionError(
                f"{folder} holds a FEDPARA, whose factors do not say which kind of layer they are "
                "on: load it with PeftModel.from_pretrained, and convert the model"
            )
        if not isinstance(config, LoHaConfig):
            raise ConversionError(f"{folder} holds a {config.peft_type.value}, not a LoHa")
        self.config = config

    def alpha_of(self, layer: FoundLayer) -> float:
        """A layer's alpha. PEFT takes the first pattern that matches, in the order of the file.

        Raises:
            ConversionError: by the patterns its rank is another, as PEFT would find as well.
        """
        loha, name = self.config, layer.group.name
        r = _first_of(loha.rank_pattern, name, loha.r)
        if r != layer.rank:
            raise ConversionError(
                f"{name} has rank {layer.rank}, but {r} by the first of the patterns "
                f"{sorted(loha.rank_pattern or {})} that matches, by which PEFT goes: it does not "
                "load this LoHa either; save it with patterns that do not overlap"
            )
        return _first_of(loha.alpha_pattern, name, loha.alpha)

    def settings(self, to: str) -> dict[str, Any]:
        """What the converted adapter's configuration takes over."""
        loha = self.config
        if to == "lora":
            return carried_over(loha)
        return {
            **carried_over(loha),
            "r": loha.r,
            "alpha": loha.alpha,
            "use_effective_conv2d": loha.use_effective_conv2d,
            "rank_dropout": loha.rank_dropout,
            "module_dropout": loha.module_dropout,
            "target_modules": loha.target_modules,
            "exclude_modules": loha.exclude_modules,
            "layers_to_transform": loha.layers_to_transform,
            "layers_pattern": loha.layers_pattern,
        }


def _first_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    try:
        return (patterns or {}).get(get_pattern_key(list(patterns or {}), name), default)
    except re.error as error:
        raise ConversionError(f"{patterns} has a pattern that is no regex ({error})") from None
