"""The base model as a file of adapters needs it: its modules' names and their weights' shapes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConversionError, LayoutError
from ...names import base_names
from .stream import TensorFile

#: What may stand for a base model.
Base = nn.Module | Mapping[str, Sequence[int]] | str | os.PathLike[str]


@dataclass(frozen=True)
class BaseLayer:
    """A module with a weight.

    Attributes:
        shape: the weight's.
        transposed: whether the weight is ``(N, M)``, as transformers' Conv1D has it.
        embedding: whether it is a table.
        no_lora: why PEFT computes another function with a LoRA on it, None where it does not.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    embedding: bool = False
    no_lora: str | None = None


def base_layers(base: Base) -> dict[str, BaseLayer]:
    """The modules of a base model, by name.

    Args:
        base: the model; the shape of each module's weight, by name; or the path of its weights, a
            ``.safetensors`` file or a folder with some, of which the headers are read.

    Raises:
        ConversionError: there are no weights.
    """
    if isinstance(base, nn.Module):
        return _of_model(base)
    if isinstance(base, Mapping):
        return {name: BaseLayer(tuple(shape)) for name, shape in base.items()}
    path = Path(base)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found: dict[str, BaseLayer] = {}
    for one in files:
        with TensorFile(one) as file:
            for key, info in file.tensors.items():
                if key.endswith(".weight") and len(info.shape) > 1:
                    found[key.removesuffix(".weight")] = BaseLayer(info.shape)
    if not found:
        raise ConversionError(
            f"{path} has no weights to take names and shapes from: give the base model's "
            "safetensors file, or the folder with it"
        )
    return found


def _of_model(model: nn.Module) -> dict[str, BaseLayer]:
    modules, found = dict(model.named_modules(remove_duplicate=False)), {}
    for name, plain in base_names(model).items():
        module = modules[name]
        weight = getattr(module, "weight", None)
        if plain and isinstance(weight, nn.Parameter) and weight.dim() > 1:
            found[plain] = BaseLayer(
                tuple(weight.shape),
                transposed=isinstance(module, Conv1D),
                embedding=isinstance(module, nn.Embedding),
                no_lora=_against_lora(module),
            )
    return found


def _against_lora(module: nn.Module) -> str | None:
    """PEFT builds LoRA's convolutions from kernel size, stride and padding alone."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if module.groups != 1:
        return f"groups={module.groups}"
    if any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)):
        return f"dilation={module.dilation}"
    pads = any(module._reversed_padding_repeated_twice)
    return (
        f"padding_mode={module.padding_mode!r}" if pads and module.padding_mode != "zeros" else None
    )


def resolve_names(
    names: Mapping[str, tuple[str, bool]], layers: Mapping[str, BaseLayer]
) -> dict[str, str]:
    """What the base model calls the modules of an adapter file.

    An underscored name is that of the module whose dots were replaced. Checkpoints may have one
    prefix more before all of their names (``model.diffusion_model.``).

    Args:
        names: the file's modules, by which they are asked for: the name in the file, and whether
            its dots are underscores.
        layers: the base model's modules.

    Raises:
        LayoutError: a module is not the base's, or could be several of them.
    """
    fitting = {}
    for head in _heads(names.values(), layers):
        found = _under(head, names, layers)
        if all(found.values()):
            fitting[head] = found
            if not head:
                break
    if len(fitting) > 1:
        raise LayoutError(
            f"{next(iter(names))} and the rest may be those of {' or '.join(fitting)} in the base "
            "model: give that part of it alone"
        )
    if fitting:
        return _unique(next(iter(fitting.values())))
    missing = [m for m, (n, u) in names.items() if not _matches(n, u, layers)]
    raise LayoutError(
        f"{(missing or list(names))[0]}: no module of the base model is called so "
        f"({len(missing) or len(names)} of {len(names)} are not there): name the model that the "
        "adapter was trained on, in the same naming of blocks"
    )


def _under(
    head: str, names: Mapping[str, tuple[str, bool]], layers: Mapping[str, BaseLayer]
) -> dict[str, list[str]]:
    """The modules below a prefix that each name may be."""
    spelt: dict[str, list[str]] = {}
    for name in layers:
        if name.startswith(head):
            spelt.setdefault(name.removeprefix(head).replace(".", "_"), []).append(name)
    return {
        module: spelt.get(name, []) if underscored else [n for n in [head + name] if n in layers]
        for module, (name, underscored) in names.items()
    }


def _matches(name: str, underscored: bool, layers: Iterable[str]) -> bool:
    return any((n.replace(".", "_") if underscored else n) == name for n in layers)


def _heads(names: Iterable[tuple[str, bool]], layers: Iterable[str]) -> list[str]:
    """Prefixes that the base's names may have beyond the file's: none, then by one name's."""
    name, underscored = next(iter(names))
    heads = []
    for candidate in layers:
        parts = candidate.split(".")
        for i in range(1, len(parts)):
            rest = ".".join(parts[i:])
            if name in (rest, rest.replace(".", "_") if underscored else rest):
                heads.append(".".join(parts[:i]) + ".")
    return ["", *sorted(set(heads), key=lambda head: (head.count("."), head))]


def _unique(found: Mapping[str, list[str]]) -> dict[str, str]:
    for module, candidates in found.items():
        if len(candidates) > 1:
            raise LayoutError(
                f"{module} may be any of {', '.join(sorted(candidates))} of the base model, whose "
                "names differ in dots and underscores alone: rename one of them"
            )
    resolved = {module: candidates[0] for module, candidates in found.items()}
    twice = [name for name, count in Counter(resolved.values()).items() if count > 1]
    if twice:
        both = [module for module, name in resolved.items() if name == twice[0]]
        raise LayoutError(f"{' and '.join(both)} are both {twice[0]} of the base model")
    return resolved
