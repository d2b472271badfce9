"""Configurations and adapters by folder or Hub id; what goes wrong there, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ..tuner.convert.layouts.source import AdapterFile
from ..tuner.errors import LayoutError
from .errors import CommandError

_ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


@contextmanager
def explained(what: str, option: str) -> Iterator[None]:
    """Name the option that helps when a Hub id cannot be resolved."""
    if not Path(what).exists() and (Path(what).is_absolute() or what.startswith((".", "~"))):
        raise CommandError(f"there is no {what}: give {option} a folder that exists, or a Hub id")
    try:
        yield
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if Path(what).exists():
            raise CommandError(
                f"{what} cannot be loaded ({first_line(error)}): give {option} a folder that "
                "transformers saved"
            ) from None
        raise CommandError(
            f"{what!r} is no local folder, and not to be had from the Hub "
            f"({first_line(error)}): give {option} a folder on this machine, or, "
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
        with explained(model, option):
            return AutoConfig.from_pretrained(model)
    except CommandError:
        raise
    except Exception as error:  # whatever transformers makes of a file that is none of its own
        raise CommandError(
            f"{model} is no configuration that transformers knows: {first_line(error)}"
        ) from None


def first_line(error: Exception) -> str:
    """What an error says first; its type's name if nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def adapter_folder(adapter: str) -> Path:
    """The local folder of an adapter; fetched if it is a Hub id.

    Raises:
        CommandError: there is no adapter there.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        with explained(adapter, "ADAPTER"):
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
        with explained(adapter, "ADAPTER"):
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


def adapter_config(folder: Path) -> Any:
    """The adapter's configuration, of whatever method.

    Raises:
        CommandError: it is not one.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT makes of a file that is none of its own
        raise CommandError(f"{folder}/adapter_config.json cannot be read: {error}") from None
