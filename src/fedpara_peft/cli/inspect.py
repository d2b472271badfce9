"""``fedpara inspect``: what an adapter holds, what is local to a client and missing from it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..comm.ledger import shown_bytes
from ..comm.state import LOCAL_WEIGHTS_NAME
from ..tuner._peft import WRAPPER_PREFIX
from ..tuner.config import FedParaConfig
from ..tuner.convert import inspect_adapter
from ..tuner.convert.layouts.keys import METHODS
from ..tuner.convert.layouts.stream import TensorFile, TensorInfo
from ..tuner.layer import FACTOR_CONTAINER, REMAINDER_CONTAINER
from .arguments import new_parser
from .hub import adapter_config, adapter_source

_EXAMPLES = """\
examples:
  fedpara inspect ./adapter
  fedpara inspect me/my-adapter        # on the Hub
  fedpara inspect style.safetensors    # of kohya, LyCORIS, ComfyUI, diffusers, …

Only the file's header is read: nothing is loaded, no base model is needed.
"""
#: What PEFT's LoRA and LoHa call their factors.
_FACTORS = {
    *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
    *METHODS["LoHa"],
}
#: Of a trainer's many notes those that say what it is.
_SHOWN = {
    "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    "ss_network_args", "ss_output_name", "ss_sd_model_name",
}  # fmt: skip
_DEFAULTS = FedParaConfig(target_modules=["x"])


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(
        commands, "inspect", "show what an adapter holds and what it lacks", _EXAMPLES, run
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder, .safetensors file or Hub id")


def run(args: argparse.Namespace) -> None:
    """Print configuration, layers, sizes, and what is missing."""
    folder = adapter_source(args.adapter)
    if folder.is_file():
        _show_file(args.adapter, folder)
        return
    config = adapter_config(folder)
    tensors = _tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    print(f"{args.adapter}: {getattr(config.peft_type, 'value', config.peft_type)}")
    print(f"base model: {config.base_model_name_or_path or 'not named'}")
    for name, value in _settings(config).items():
        print(f"{name}: {value}")
    print()
    rows = [("layer", "r", "tensors", "values", "bytes")]
    grouped = _by_layer(tensors)
    for layer, own in grouped.items():
        rows.append((layer, _rank(own), str(len(own)), *_sizes(own)))
    rows.append(("total", "", str(len(tensors)), *_sizes(tensors)))
    _print_table(rows)
    for note in _notes(config, folder):
        print(f"\n{note}")


def _show_file(name: str, path: Path) -> None:
    """A file of adapters, whoever wrote it."""
    found = inspect_adapter(path)
    methods = Counter(layer.method for layer in found.layers)
    print(f"{name}: {found.layout}")
    print(f"layers: {', '.join(f'{n} x {method}' for method, n in methods.items()) or 'none'}")
    for key in sorted(found.metadata):
        if not key.startswith("ss_") or key in _SHOWN:
            value = " ".join(found.metadata[key].split())
            print(f"{key}: {value[:96]}{'…' * (len(value) > 96)}")
    print()
    rows = [("layer", "method", "r", "alpha", "shape", "values", "bytes")]
    for x in found.layers:
        rows.append(
            (
                x.module,
                x.method + " Tucker" * x.has_core + " + DoRA" * x.weight_decomposed,
                "-" if x.rank is None else str(x.rank),
                "-" if x.alpha is None else f"{x.alpha:g}",
                " x ".join(map(str, x.shape)) or "-",
                f"{x.num_values:,}",
                shown_bytes(x.num_bytes),
            )
        )
    values, size = (sum(getattr(x, of) for x in found.layers) for of in ("num_values", "num_bytes"))
    rows.append(("total", "", "", "", "", f"{values:,}", shown_bytes(size)))
    _print_table(rows)
    if found.rest:
        print(f"\nno layer's: {_listed(found.rest)}")


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor."""
    with TensorFile(path) as file:
        return file.tensors


def _settings(config: Any) -> dict[str, Any]:
    """What differs from the defaults, and what everyone wants to know."""
    if not isinstance(config, FedParaConfig):
        targets = getattr(config, "target_modules", None)
        return {"r": getattr(config, "r", "-"), "target modules": _listed(targets)}
    always = ("parameterization", "base_weight", "r", "gamma")
    hidden = {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode", "target_modules", "base_digest",
    }  # fmt: skip
    shown = {name: getattr(config, name) for name in always}
    if config.gamma is None:
        del shown["gamma"]
    else:
        del shown["r"]  # γ decides
    for name, value in vars(config).items():
        default = getattr(_DEFAULTS, name, None)
        if name not in hidden and name not in always and value not in (default, None, {}, []):
            shown[name] = _listed(value)
    return {**shown, "target modules": _listed(config.target_modules)}


def _listed(value: Any) -> str:
    if not isinstance(value, list | set | tuple):
        return str(value)
    names = sorted(map(str, value))
    return ", ".join(names[:6]) + (f", … ({len(names)})" if len(names) > 6 else "")


def _by_layer(
    tensors: Mapping[str, TensorInfo],
) -> dict[str, dict[str, TensorInfo]]:
    """The tensors by the module they belong to."""
    split = {name: _split(name.removeprefix(WRAPPER_PREFIX)) for name in tensors}
    adapted = {layer for layer, own in split.values() if _is_factor(own.partition(".")[0])}
    grouped: dict[str, dict[str, TensorInfo]] = {}
    for name, (layer, own) in split.items():
        # What an adapter saves of the layer that it wraps, its bias, belongs to that layer.
        wrapped = layer.removesuffix(".base_layer")
        layer = wrapped if wrapped in adapted else layer
        grouped.setdefault(layer or "(model)", {})[own] = tensors[name]
    return grouped


def _split(name: str) -> tuple[str, str]:
    """A tensor's module, and its name there."""
    parts = name.split(".")
    cut = next((i for i, part in enumerate(parts) if _is_factor(part)), len(parts) - 1)
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def _is_factor(name: str) -> bool:
    ours = name == REMAINDER_CONTAINER or FACTOR_CONTAINER.fullmatch(name) is not None
    return ours or name in _FACTORS


def _rank(own: Mapping[str, TensorInfo]) -> str:
    """Inner ranks of a layer's factors, from their shapes."""
    outer = {name for name in own if FACTOR_CONTAINER.match(name) and "_x" in name}
    ranks = {own[name].shape[-1] for name in outer if own[name].shape}
    first = {"hada_w1_b", "hada_w2_b", "lora_A.weight", "lora_embedding_A"}
    ranks |= {own[name].shape[0] for name in first & own.keys() if own[name].shape}
    return ", ".join(map(str, sorted(ranks))) or "-"


def _sizes(own: Mapping[str, TensorInfo]) -> tuple[str, str]:
    values = sum(info.num_values for info in own.values())
    return f"{values:,}", shown_bytes(sum(info.num_bytes for info in own.values()))


def _notes(config: Any, folder: Path) -> list[str]:
    """What is not in the adapter."""
    if not isinstance(config, FedParaConfig):
        return []
    notes = []
    personal = [f"W{chr(ord('₁') + half)} of every layer" for half in config.form.local_halves]
    if config.local_modules:
        personal.append(f"the modules {_listed(config.local_modules)}")
    if personal:
        here = (folder / LOCAL_WEIGHTS_NAME).is_file()
        found = (
            f"They lie beside it in {LOCAL_WEIGHTS_NAME}: do not push this folder."
            if here
            else "Without a client's own (save_local, load_local) the model is the shared one."
        )
        notes.append(f"local, so not in this adapter: {' and '.join(personal)}. {found}")
    if config.base_weight == "seeded":
        notes.append("its base weights follow from base_seed: merging needs only a configuration.")
    elif config.from_scratch:
        notes.append("the base model's weights are in it: merging needs only its configuration.")
    else:
        notes.append("the base model's weights are not in it: using it needs the base model.")
    return notes
