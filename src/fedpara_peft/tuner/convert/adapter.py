"""``convert_adapter``: any LoHa from any layout to any other, exactly or at a rank."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from tqdm import tqdm

from ...maths.approximation.truncate import check_truncation
from ...maths.errors import RankError
from ..errors import ConversionError
from .layouts.base import Base
from .layouts.folders import FolderWriter
from .layouts.stream import HASH_KEYS
from .layouts.writers import ConvertedLayer, FileWriter, To, Truncate
from .sources import FileSource, ModelSource, Source, check_folder

#: Under which a conversion describes itself in the metadata of the file, as JSON.
METADATA_KEY = "fedpara.conversion"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        source: the layout that was found.
        target: the file or folder that was written.
        to: the layout that was asked for.
        layers: what became of each layer.
        passed_on: layers of other methods that were copied as they are.
        left_out: layers of the components that were not asked for.
        config: the PEFT configuration of a folder, None for a file.
    """

    source: str
    target: Path
    to: str
    layers: tuple[ConvertedLayer, ...]
    passed_on: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    config: Any = None

    @property
    def rank(self) -> int:
        """The largest rank written."""
        return max(layer.rank for layer in self.layers)

    @property
    def error(self) -> float:
        """Relative Frobenius error of all layers together; 0 where they are exact."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        lost = math.fsum((layer.error * layer.norm) ** 2 for layer in self.layers)
        return math.sqrt(lost / total) if total else max(layer.error for layer in self.layers)


def convert_adapter(
    source: nn.Module | str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: To,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    base: Base | None = None,
    component: str | None = None,
    prefix: str | None = None,
    others: Literal["refuse", "keep"] = "refuse",
    adapter_name: str = "default",
    progress: bool = False,
) -> Conversion:
    """Write an adapter in another layout: exactly, or as the best LoRA of a rank.

    The source's layout is told by its keys. One layer is in memory at a time. Nothing is at the
    target unless all of it could be written.

    Args:
        source: a ``.safetensors`` file (kohya, LyCORIS, ComfyUI, diffusers, plain module paths), a
            folder of a PEFT LoHa, or a model with FedPara adapters over a frozen base.
        target: what to write. For ``"kohya"`` and ``"lycoris"`` a ``.safetensors`` file; for
            ``"lora"`` and ``"loha"`` such a file (as diffusers and ComfyUI have them) or a folder
            for PEFT; for ``"fedpara"`` a folder.
        to: ``"lora"``, ``"kohya"``: LoRA, of rank r² where it is exact; ``"loha"``,
            ``"lycoris"``: LoHa; ``"fedpara"``: this package's adapter.
        rank: the best LoRA of this rank, in the Frobenius norm, layer by layer; layers whose exact
            form has no more stay exact.
        tolerance: the best LoRA of the least rank whose relative error is at most this, before its
            factors are rounded to the source's dtype.
        base: the base model: for the dots of underscored names, and for the shapes that a matrix
            of a convolution does not tell. A module, shapes by name, or the path of its weights.
        component: convert this part of a pipeline alone (``"unet"``, ``"text_encoder"``, …).
        prefix: put before the names of a file's modules, in place of the layout's own.
        others: layers of other methods (LoKr, full differences, …; for LoHa targets also LoRA):
            refused by name, or copied as they are into a file.
        adapter_name: of a model, the adapter.
        progress: show a progress bar.

    Returns:
        What was written, with the error of each layer and of all together.

    Raises:
        LayoutError: the source is damaged or of no known layout; the message names the key.
        ConversionError: a layer has no form in the target, or names and shapes need a base.

    Example:
        >>> convert_adapter("style.safetensors", "style-lora.safetensors", "kohya", rank=32)
    """
    path = Path(target)
    truncate = _checked(path, to, rank, tolerance)
    if others not in ("refuse", "keep"):
        raise ConversionError(f"others must be 'refuse' or 'keep', got {others!r}")
    with ExitStack() as stack:
        opened: Source
        if isinstance(source, nn.Module):
            opened = ModelSource(source, adapter_name, to, path)
        else:
            keep, folder = others == "keep", path.suffix != SUFFIX
            opened = FileSource(source, stack, base, component, to, keep, folder)
        return _written(opened, path, to, prefix, truncate, progress)


def _written(
    source: Source, path: Path, to: To, prefix: str | None, truncate: Truncate, progress: bool
) -> Conversion:
    writer: FileWriter | FolderWriter
    several = len(source.components) > 1 and not source.left_out
    if path.suffix == SUFFIX:
        if several and prefix is not None:
            raise ConversionError(
                f"prefix={prefix!r} is for one part, and the file has layers for "
                f"{sorted(source.components)}: say which with component=…"
            )
        writer = FileWriter(path, to, prefix, truncate, source.components)
    else:
        if several:
            raise ConversionError(
                f"the file has layers for {sorted(source.components)}, and a folder of PEFT's is "
                "for one model: say which with component=…"
            )
        if prefix is not None:
            raise ConversionError("prefix= is for files; PEFT's folders have their own")
        writer = FolderWriter(path, to, truncate, source.modules, source.settings)
    with writer:
        if writer.wants_dots and source.underscored is not None:
            raise ConversionError(
                f"{source.underscored} has underscores for dots, and {to} needs the names that the "
                "modules have: give base=, the model that it was trained on"
            )
        shown = tqdm(source.layers(), total=len(source), disable=not progress, unit="layer")
        layers = tuple(writer.add(layer, before) for layer, before in shown)
        source.write_rest(writer)
        done = Conversion(source.layout, path, to, layers, source.passed_on, source.left_out)
        writer.finish(_metadata(source.metadata, done, truncate))
    return replace(done, config=writer.config)


def _checked(path: Path, to: To, rank: int | None, tolerance: float | None) -> Truncate:
    if to not in get_args(To):
        raise ConversionError(f"to must be one of {get_args(To)}, got {to!r}")
    try:
        check_truncation(rank, tolerance)
    except RankError as error:
        raise ConversionError(str(error)) from None
    truncate = Truncate(rank, tolerance)
    if truncate.asked and to not in ("lora", "kohya"):
        raise ConversionError(f"rank and tolerance are for LoRA (to='lora', 'kohya'), not {to!r}")
    is_file = path.suffix == SUFFIX
    if is_file if to == "fedpara" else not is_file and to in ("kohya", "lycoris"):
        raise ConversionError(
            f"{path}: {to} is {'a folder' if to == 'fedpara' else f'a file, named *{SUFFIX}'}"
        )
    if not is_file:
        check_folder(path, to)
    return truncate


#: What a trainer says of the network that it trained, which is another one now.
_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


def _metadata(source: Mapping[str, str], done: Conversion, truncate: Truncate) -> dict[str, str]:
    """The source's metadata, and what was done; hashes are those of other bytes and go."""
    kept = {k: v for k, v in source.items() if k not in HASH_KEYS}
    note: dict[str, Any] = {"from": done.source, "to": done.to, "rank": done.rank}
    is_lora = done.to in ("lora", "kohya")
    if truncate.asked:
        note |= {
            "rank_asked": truncate.rank,
            "tolerance": truncate.tolerance,
            "error": done.error,
            "errors": {layer.name: layer.error for layer in done.layers},
        }
    network = {k: kept[k] for k in _NETWORK if k in kept}
    if network and is_lora:
        note["network"] = network
        ranks = {layer.rank for layer in done.layers}
        same = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        del network
        for key in _NETWORK:
            kept.pop(key, None)
        kept |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": same,
            "ss_network_alpha": same,
        }
    return {**kept, METADATA_KEY: json.dumps(note)}
