"""``fedpara inspect``: what an adapter holds, what is local to a client and missing from it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..comm.ledger import shown_bytes
from ..comm.state import LOCAL_WEIGHTS_NAME
from ..tuner._peft import WRAPPER_PREFIX
from ..tuner.config import FedParaConfig
from ..tuner.layer import FACTOR_CONTAINER
from .arguments import new_parser
from .hub import adapter_config, adapter_folder

_EXAMPLES = """\
examples:
  fedpara inspect ./adapter
  fedpara inspect me/my-adapter        # on the Hub

Only the file's header is read: nothing is loaded, no base model is needed.
"""
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
#: What LoRA and LoHa call their factors.
_FACTORS = {
    *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
    *(f"hada_{factor}" for factor in ("w1_a", "w1_b", "t1", "w2_a", "w2_b", "t2")),
}
_DEFAULTS = FedParaConfig(target_modules=["x"])


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(
        commands, "inspect", "show what an adapter holds and what it lacks", _EXAMPLES, run
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")


def run(args: argparse.Namespace) -> None:
    """Print configuration, layers, sizes, and what is missing."""
    folder = adapter_folder(args.adapter)
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
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    for note in _notes(config, folder):
        print(f"\n{note}")


def _tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}


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
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """The tensors by the module they belong to."""
    split = {name: _split(name.removeprefix(WRAPPER_PREFIX)) for name in tensors}
    adapted = {layer for layer, own in split.values() if _is_factor(own.partition(".")[0])}
    grouped: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {}
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
    return name in _FACTORS or FACTOR_CONTAINER.fullmatch(name) is not None


def _rank(own: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    """Inner ranks of a layer's factors, from their shapes."""
    outer = {name for name in own if FACTOR_CONTAINER.match(name) and "_x" in name}
    shapes = [own[name][0] for name in outer]
    ranks = {shape[-1] for shape in shapes if shape}
    return ", ".join(map(str, sorted(ranks))) or "-"


def _sizes(own: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[str, str]:
    values, num_bytes = 0, 0
    for shape, dtype in own.values():
        count = 1
        for size in shape:
            count *= size
        values += count
        num_bytes += count * _BYTES.get(dtype, 1)
    return f"{values:,}", shown_bytes(num_bytes)


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
