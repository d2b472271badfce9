"""What conversions share: the adapter to convert, and what is already in the target."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft import PeftType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from .._peft import is_key_under_prefixes
from ..config import FedParaConfig
from ..errors import ConversionError
from ..layer import factorized_layers
from ..names import saved_name


def config_of(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str, called: str
) -> FedParaConfig:
    """The adapter's configuration; raises :class:`ConversionError` where nothing can be written."""
    if not isinstance(model, nn.Module) or not isinstance(adapter_name, str):
        given = ", ".join(type(a).__name__ for a in (model, folder, adapter_name))
        raise ConversionError(
            f"{called}(model, folder, adapter_name='default') was given ({given}): the model goes "
            "first, and a rank by its name; peft.save_as_lora takes (path, model, rank)"
        )
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, FedParaConfig):
        raise ConversionError(
            f"the model has no FedPara adapter {adapter_name!r}; it has {sorted(configs)}"
        )
    if config.from_scratch:
        raise ConversionError(
            f"base_weight={config.base_weight!r} has no base weight that an adapter could be added "
            "to: merge_and_unload() gives the plain model"
        )
    return config


def carried_over(config: Any) -> dict[str, Any]:
    """Settings that every method has."""
    return {
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "modules_to_save": config.modules_to_save,
        "inference_mode": True,
    }


def rest_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What the adapter saves beside its factors: biases and modules_to_save."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    factors = {
        f"{saved_name(name)}.{container}"
        for name, layer in factorized_layers(model)
        for container in layer.adapter_layer_names
    }
    return {k: v for k, v in state.items() if not is_key_under_prefixes(k, factors)}


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
