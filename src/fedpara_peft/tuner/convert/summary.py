"""``inspect_adapter``: what a file of adapters holds, by its header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .layouts.keys import DORA
from .layouts.source import AdapterFile
from .sources import adapter_path


@dataclass(frozen=True)
class FileLayer:
    """A layer of a file of adapters.

    Attributes:
        module: the module as the file has it, prefix and all.
        component: the part of a pipeline that it is in, "" where the layout has no parts.
        method: ``"LoHa"``, ``"LoRA"``, ``"LoKr"``, …
        rank: r; None for methods that are only named.
        alpha: numerator of the scale; None: the file has none.
        shape: the weight that it adds to, as far as its factors tell; empty for other methods.
        has_core: whether it is a kernel in Tucker form.
        weight_decomposed: whether it has DoRA's magnitudes.
        num_values: entries of its tensors.
        num_bytes: their size.
    """

    module: str
    component: str
    method: str
    rank: int | None
    alpha: float | None
    shape: tuple[int, ...]
    has_core: bool
    weight_decomposed: bool
    num_values: int
    num_bytes: int


@dataclass(frozen=True)
class AdapterSummary:
    """What a file of adapters holds.

    Attributes:
        layout: who writes files so, and the prefixes found.
        layers: the layers, in the file's order.
        rest: keys that are no layer's.
        metadata: the file's own.
    """

    layout: str
    layers: tuple[FileLayer, ...]
    rest: tuple[str, ...]
    metadata: Mapping[str, str]


def inspect_adapter(source: str | os.PathLike[str]) -> AdapterSummary:
    """What a file of adapters holds; no factor is read, and no model needed.

    Args:
        source: a ``.safetensors`` file in any layout, or a folder with one.

    Returns:
        Its layout, layers and metadata.

    Raises:
        LayoutError: the file or a layer is damaged; the message names the key.
        ConversionError: there is no file, or there are several.

    Example:
        >>> inspect_adapter("style.safetensors").layout
        'kohya (lora_unet_, lora_te_)'
    """
    with AdapterFile(adapter_path(source)) as file:
        layers = []
        for layer in file.layers:
            group = layer.group
            own = [file.tensors[key] for key in group.keys.values()]
            shape = file.shape_of(layer)
            layers.append(
                FileLayer(
                    module=group.module,
                    component=group.prefix.component,
                    method=group.method,
                    rank=layer.rank,
                    alpha=file.alpha_of(layer),
                    shape=shape,
                    has_core="hada_t1" in group.keys or "lora_mid.weight" in group.keys,
                    weight_decomposed=DORA in group.keys,
                    num_values=sum(info.num_values for info in own),
                    num_bytes=sum(info.num_bytes for info in own),
                )
            )
        return AdapterSummary(file.layout, tuple(layers), tuple(file.rest), dict(file.metadata))
