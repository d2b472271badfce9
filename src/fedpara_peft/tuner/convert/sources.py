"""Where layers come from: a file or folder in any layout, or a live model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from .._peft import FEDPARA as FEDPARA_TYPE
from ..errors import ConversionError, LayoutError
from ..layer import factorized_layers
from ..names import base_names
from .folder import carried_over, check_target, config_of, rest_of
from .from_model import model_layers
from .layouts.base import Base, BaseLayer, base_layers, resolve_names
from .layouts.folders import FolderWriter
from .layouts.keys import BARE, COMPONENTS
from .layouts.layer import Layer
from .layouts.source import READ, AdapterFile, FoundLayer
from .layouts.writers import FileWriter, To
from .peft_folder import PeftLoHa

_LOHA = ("loha", "lycoris")
METHODS = {"lora": PeftType.LORA, "loha": PeftType.LOHA, "fedpara": FEDPARA_TYPE}


class Source:
    """What is converted.

    Attributes:
        layout: who writes so.
        metadata: the file's.
        components: the parts of a pipeline that it has layers for.
        passed_on: layers that are copied as they are.
        left_out: layers of the components that were not asked for.
        settings: what the adapter has for a configuration of PEFT's.
        modules: the modules of the base model, None where they are unknown.
        underscored: the first layer whose name's dots are underscores.
    """

    layout: str
    metadata: Mapping[str, str]
    components: set[str]
    passed_on: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    settings: dict[str, Any]
    modules: set[str] | None = None
    underscored: str | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def layers(self) -> Iterator[tuple[Layer, str]]:
        """The layers one at a time, and what the layout put before their names."""
        raise NotImplementedError

    def write_rest(self, writer: FileWriter | FolderWriter) -> None:
        """Write what is no layer, or no layer of a method that is read."""
        raise NotImplementedError


class ModelSource(Source):
    """A model with FedPara adapters over a frozen base."""

    layout = "a model"

    def __init__(self, model: nn.Module, adapter_name: str, to: To, target: Path) -> None:
        config = config_of(model, target, adapter_name, "convert_adapter")
        method = "loha" if to in _LOHA else "lora"
        if to == "fedpara":
            raise ConversionError("the model has a FedPara adapter already: save_pretrained")
        if method == "loha":
            _check_loha(config)
        self._model, self._adapter, self._method = model, adapter_name, method
        self._layers = list(model_layers(model, adapter_name, method))
        self.components = {""}
        self.metadata = {}
        self.modules = set(base_names(model).values())
        self.settings = carried_over(config)
        if method == "lora":
            bias = {"fedpara_only": "lora_only"}.get(config.bias, config.bias)
            self.settings["bias"] = bias
            self._refuse_missing_local_half(config)
        else:
            for name in ("use_effective_conv2d", "rank_dropout", "module_dropout"):
                self.settings[name] = getattr(config, name)

    def __len__(self) -> int:
        return len(self._layers)

    def layers(self) -> Iterator[tuple[Layer, str]]:
        """The layers, in the model's order."""
        for layer in self._layers:
            yield layer, ""

    def write_rest(self, writer: FileWriter | FolderWriter) -> None:
        """Biases and modules that the adapter saves whole, which only a folder has a place for."""
        rest = rest_of(self._model, self._adapter)
        if rest and isinstance(writer, FileWriter):
            raise ConversionError(
                f"{next(iter(rest))} is trained beside the layers, and a file has no place for it: "
                "convert to a folder"
            )
        for key, tensor in rest.items():
            writer.add_rest(key, tensor)

    def _refuse_missing_local_half(self, config: Any) -> None:
        local = [
            layer.halves(self._adapter)[i]
            for _, layer in factorized_layers(self._model, self._adapter)
            for i in config.form.local_halves
        ]
        # Whichever factor a start has set to zero, the half is zero.
        if local and not any(bool(half.x.any()) and bool(half.y.any()) for half in local):
            raise ConversionError(
                "the adapter has no personal half (W₂ = 0 everywhere): load_local(model, folder) "
                "first"
            )


class FileSource(Source):
    """A ``.safetensors`` file, alone or in the folder of a PEFT LoHa."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        stack: ExitStack,
        base: Base | None,
        component: str | None,
        to: To,
        keep: bool,
        to_folder: bool,
    ) -> None:
        path, self._to = adapter_path(source), to
        is_peft = path.name == SAFETENSORS_WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file()
        self._loha = PeftLoHa(path.parent) if is_peft else None
        self._file = stack.enter_context(AdapterFile(path))
        self.layout, self.metadata = self._file.layout, self._file.metadata
        found = self._file.layers
        if not found:
            raise LayoutError(
                f"{path} has no LoHa factors in it, nor those of another method that is known"
                + (f" (it has {self._file.rest[0]})" if self._file.rest else "")
            )
        self.components = {layer.group.prefix.component for layer in found}
        chosen = [x for x in found if component in (None, x.group.prefix.component)]
        self.left_out = tuple(x.group.module for x in found if x not in chosen)
        if not chosen:
            raise ConversionError(
                f"{path} has nothing for component={component!r}: it has {sorted(self.components)}"
            )
        self._read = [x for x in chosen if _is_read(x, to)]
        self._kept = [x for x in chosen if x not in self._read]
        self.passed_on = tuple(x.group.module for x in self._kept)
        # What PEFT saves beside a LoHa has a place in a folder of its, and alien keys have none.
        takes_rest = self._loha is not None if to_folder else keep
        self._check_others(to, keep, takes_rest)
        self.settings = {} if self._loha is None else self._loha.settings(to)
        self._base: dict[str, BaseLayer] | None = None if base is None else base_layers(base)
        self.modules = None if self._base is None else set(self._base)
        self._names = self._resolved(component)
        spelt = [x.group.module for x in self._read if x.group.prefix.underscored]
        self.underscored = spelt[0] if spelt and self._base is None else None
        # Errors of the alphas come before anything is converted.
        self._alphas = [self._alpha(x) for x in self._read]

    def __len__(self) -> int:
        return len(self._read)

    def layers(self) -> Iterator[tuple[Layer, str]]:
        """The layers, one at a time, in the file's order."""
        for found, alpha in zip(self._read, self._alphas, strict=True):
            layer = self._file.read(found, alpha)
            if self._base is not None:
                name = self._names[found.group.module]
                module = self._base[name]
                if module.no_lora is not None and self._to not in ("fedpara", *_LOHA):
                    raise ConversionError(
                        f"{name}: PEFT's LoRA convolves in another way, the layer has "
                        f"{module.no_lora}; merge the adapter instead"
                    )
                layer = layer.on(name, module)
            yield layer, found.group.prefix.text

    def write_rest(self, writer: FileWriter | FolderWriter) -> None:
        """Layers of other methods, and tensors that are no layer's."""
        for found in self._kept:
            keys = found.group.keys.items()
            writer.pass_on(found.group, {f: self._file.file.read(key) for f, key in keys})
        for key in self._file.rest:
            writer.add_rest(key, self._file.file.read(key))

    def _alpha(self, found: FoundLayer) -> float | None:
        own = self._file.alpha_of(found)
        return own if own is not None or self._loha is None else self._loha.alpha_of(found)

    def _resolved(self, component: str | None) -> dict[str, str]:
        if self._base is None:
            return {}
        parts = {x.group.prefix.component for x in self._read}
        if len(parts) > 1:
            raise ConversionError(
                f"the base is one model, and the file has layers for {sorted(parts)}: say which "
                "with component=…"
            )
        groups = [x.group for x in self._read]
        names = {g.module: (g.name, g.prefix.underscored) for g in groups}
        heads = {g.name.partition(".")[0] for g in groups if g.prefix is BARE}
        if len(heads) != 1 or not heads <= set(COMPONENTS) or parts != {""}:
            return resolve_names(names, self._base)
        # The trunk of a plain model, or a part of a pipeline: the base tells which.
        head = f"{heads.pop()}."
        within = any(name.startswith(head) for name in self._base)
        plain = {m: (n if within else n.removeprefix(head), u) for m, (n, u) in names.items()}
        return resolve_names(plain, self._base)

    def _check_others(self, to: To, keep: bool, takes_rest: bool) -> None:
        rest = self._file.rest
        if self._kept and not (keep and self._read):
            first = self._kept[0].group
            raise LayoutError(
                f"{first.module} is a {first.method} ({', '.join(first.keys)}), which has no form "
                f"as {to}; {len(self._kept)} layers are such: convert to a file with "
                "others='keep', which copies them as they are, or take them out"
            )
        if rest and not takes_rest:
            raise LayoutError(
                f"{rest[0]} belongs to no layer of a known layout ({len(rest)} keys are such): "
                "convert to a file with others='keep', which copies them as they are, or take "
                "them out"
            )


def adapter_path(source: str | os.PathLike[str]) -> Path:
    """The weights of an adapter: the file itself, PEFT's in its folder, or the only one there.

    Raises:
        ConversionError: there is none, or there are several.
    """
    path = Path(source)
    if path.is_file():
        return path
    if (path / CONFIG_NAME).is_file():
        return PeftLoHa(path).path
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = f"several ({', '.join(file.name for file in files[:3])}, …)" if files else "none"
    raise ConversionError(
        f"no adapter_model.safetensors in {source}, and of other .safetensors files {found}: give "
        "one file"
    )


def check_folder(target: Path, to: To) -> None:
    """Refuse a folder with another method's adapter."""
    check_target(target, METHODS[to])


def _is_read(found: FoundLayer, to: To) -> bool:
    if to in _LOHA:
        return found.group.method == "LoHa"
    return found.group.method in READ


def _check_loha(config: Any) -> None:
    if config.form.name != "fedpara" or config.nonlinearity is not None:
        raise ConversionError(
            f"LoHa has no {config.parameterization!r} with nonlinearity={config.nonlinearity!r}: "
            "only parameterization='fedpara' without nonlinearity is the same"
        )
    if config.bias != "none":
        raise ConversionError(f"LoHa trains no biases, the adapter has bias={config.bias!r}")
