"""Models and adapters by folder or Hub id; what goes wrong there, said in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..tuner.convert.layouts.source import AdapterFile
from ..tuner.errors import LayoutError
from ..tuner.layer import factorized_layers
from .errors import CommandError

_ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


@contextmanager
def _explained(what: str, option: str) -> Iterator[None]:
    """Name the option that helps when a Hub id cannot be resolved."""
    if not Path(what).exists() and (Path(what).is_absolute() or what.startswith((".", "~"))):
        raise CommandError(f"there is no {what}: give {option} a folder that exists, or a Hub id")
    try:
        yield
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if Path(what).exists():
            raise CommandError(
                f"{what} cannot be loaded ({_first_line(error)}): give {option} a folder that "
                "transformers saved"
            ) from None
        raise CommandError(
            f"{what!r} is no local folder, and not to be had from the Hub "
            f"({_first_line(error)}): give {option} a folder on this machine, or, "
            "with a network, set HF_HUB_OFFLINE=0 and HF_TOKEN if it is private"
        ) from None


def load_model_config(model: str, option: str) -> Any:
    """The configuration of a transformers model.

    Args:
        model: folder, ``config.json``, or Hub id.
        option: the argument it was given as, for the error.

    Raises:
        CommandError: there is none.
    """
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CommandError(
            f"{model} has no config.json: give {option} the folder of a transformers model"
        )
    try:
        with _explained(model, option):
            return AutoConfig.from_pretrained(model)
    except CommandError:
        raise
    except Exception as error:  # whatever transformers makes of a file that is none of its own
        raise CommandError(
            f"{model} is no configuration that transformers knows: {_first_line(error)}"
        ) from None


def model_class(config: Any) -> Any:
    """The class that the configuration's weights were saved from; a bare model if unknown."""
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    models = (cls for cls in named if isinstance(cls, type) and issubclass(cls, PreTrainedModel))
    return next(models, None)


def empty_model(config: Any) -> nn.Module:
    """The model on the ``meta`` device: shapes, no weights."""
    with torch.device("meta"):
        return random_model(config)


def random_model(config: Any) -> nn.Module:
    """The model with fresh weights."""
    cls = model_class(config)
    try:
        return cls(config) if cls is not None else AutoModel.from_config(config)
    except Exception as error:  # whatever a model makes of sizes that it cannot have
        raise CommandError(
            f"{config.name_or_path}: transformers makes no model of this configuration "
            f"({_first_line(error)})"
        ) from None


def load_model(model: str, option: str) -> nn.Module:
    """The model with its weights."""
    cls = model_class(load_model_config(model, option)) or AutoModel
    try:
        with _explained(model, option):
            return cls.from_pretrained(model)
    except CommandError:
        raise
    except Exception as error:  # damaged weights, or sizes that no model has
        raise CommandError(
            f"{model} cannot be loaded ({_first_line(error)}): save or fetch it again"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def adapter_folder(adapter: str) -> Path:
    """The local folder of an adapter; fetched if it is a Hub id.

    Raises:
        CommandError: there is no adapter there.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        with _explained(adapter, "ADAPTER"):
            *_, last = (hf_hub_download(adapter, name) for name in _ADAPTER_FILES)
            folder = Path(last).parent
    missing = [name for name in _ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        inner = sorted(str(p.parent) for p in folder.glob("*/adapter_config.json"))
        hint = f"; did you mean {inner[0]}?" if inner else ": give a folder that PEFT saved"
        raise CommandError(f"{adapter} holds no adapter ({' and '.join(missing)} missing){hint}")
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt"):
            return folder
    except SafetensorError as error:
        raise CommandError(
            f"{adapter} has a {SAFETENSORS_WEIGHTS_NAME} that is none ({error}): save or fetch it "
            "again"
        ) from None


def adapter_source(adapter: str) -> Path:
    """Where an adapter is: a folder of PEFT's, or a file of adapters, which a folder or a
    repository of the Hub (``owner/name/file.safetensors``) may hold.

    Raises:
        CommandError: there is no adapter there.
    """
    path = Path(adapter)
    if path.is_file():
        return path
    owner, _, rest = adapter.partition("/")
    name, _, file = rest.partition("/")
    if file.endswith(".safetensors") and not path.parent.is_dir():
        with _explained(adapter, "ADAPTER"):
            return Path(hf_hub_download(f"{owner}/{name}", file))
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        files = list(path.glob("*.safetensors"))
        if len(files) == 1 and holds_adapters(files[0]):
            return files[0]
    return adapter_folder(adapter)


def holds_adapters(path: Path) -> bool:
    """Whether a file has layers of adapters in it; one that is damaged has."""
    try:
        with AdapterFile(path) as file:
            return bool(file.layers)
    except LayoutError:
        return True


def base_of(model: str, option: str) -> nn.Module | Path:
    """What names and shapes of a base model's modules are taken from.

    A transformers model is built without weights; of any other the headers of its weights are read.

    Args:
        model: folder, ``config.json``, ``.safetensors`` file, or Hub id.
        option: the argument it was given as, for the error.
    """
    path = Path(model)
    if path.suffix == ".safetensors" and path.is_file():
        return path
    if path.is_dir() and any(path.glob("*.safetensors")) and not _is_transformers(path):
        return path
    return empty_model(load_model_config(model, option))


def _is_transformers(folder: Path) -> bool:
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def adapter_config(folder: Path) -> Any:
    """The adapter's configuration, of whatever method.

    Raises:
        CommandError: it is not one.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT makes of a file that is none of its own
        raise CommandError(f"{folder}/adapter_config.json cannot be read: {error}") from None


def keys_that_differ(model: nn.Module, folder: Path) -> list[str]:
    """Tensors that either the model's adapter or its file lacks."""
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        saved = set(file.keys())
    # An embedding that was saved beside the factors is the base model's.
    return sorted({*(wanted - saved), *(saved - wanted - model.state_dict().keys())})


def give_memory_to_trained(model: nn.Module) -> None:
    """Replace what an adapter trains on the ``meta`` device by NaN in main memory.

    Local halves, which no adapter's file holds, become neutral.
    """
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta and p.requires_grad:
                setattr(module, name, nn.Parameter(torch.full_like(p, torch.nan, device="cpu")))
    for _, layer in factorized_layers(model):
        for adapter_name, spec in layer.specs.items():
            if spec.form.local_halves:
                layer.reset_local_half(adapter_name)
