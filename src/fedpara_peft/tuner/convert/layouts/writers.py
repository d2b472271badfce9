"""Writing layers as one file in a layout of the field."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from ..._peft import WRAPPER_PREFIX
from ...errors import ConversionError
from .keys import ALPHA, DORA, LOHA, LORA, Group
from .layer import Layer, as_lora
from .stream import TensorWriter

To = Literal["lora", "loha", "fedpara", "kohya", "lycoris"]


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of a layer.

    Attributes:
        name: the module, as it is called in the target.
        rank: of the written factors: a LoRA's, or a LoHa's inner rank.
        exact_rank: that the exact form has (of a LoHa: its inner rank).
        error: relative Frobenius error of the written factors; 0 where they are exact.
        norm: Frobenius norm of the layer's update, 0.0 where nothing was approximated.
    """

    name: str
    rank: int
    exact_rank: int
    error: float
    norm: float


@dataclass(frozen=True)
class Truncate:
    """How much of a LoRA is kept: all where both are None."""

    rank: int | None = None
    tolerance: float | None = None

    @property
    def asked(self) -> bool:
        """Whether anything may be left out."""
        return self.rank is not None or self.tolerance is not None


#: What underscored layouts call the parts of a pipeline.
_UNDERSCORED = {
    "": "lycoris_", "unet": "lora_unet_", "transformer": "lora_unet_",
    "prior": "lora_prior_unet_", "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_",
}  # fmt: skip


class FileWriter:
    """One ``.safetensors`` file.

    Args:
        path: the file.
        to: ``"kohya"``: LoRA with underscored names; ``"lycoris"``: LoHa with underscored names;
            ``"loha"``: LoHa by module paths; ``"lora"``: LoRA by module paths, as diffusers has it.
        prefix: put before the names, None for what the layer's component has in the layout.
        truncate: how much of a LoRA is kept.
        components: all that the source has, for kohya's numbering of text encoders.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        to: To,
        prefix: str | None,
        truncate: Truncate,
        components: Collection[str],
    ) -> None:
        self.to, self.prefix, self.truncate = to, prefix, truncate
        self.config: None = None
        self.wants_dots = to in ("lora", "loha")
        self._several = "text_encoder_2" in components
        self._writer = TensorWriter(path)

    def add(self, layer: Layer, prefix: str | None) -> ConvertedLayer:
        """Convert and write one layer."""
        if layer.embedding:
            raise ConversionError(
                f"{layer.name} is an embedding, which {self.to} has no layout for: write a PEFT "
                "LoRA folder, or leave it out of target_modules"
            )
        name = self._start(layer.component, prefix or "") + self._spelt(layer.name)
        if self.to in ("loha", "lycoris"):
            self._add_loha(name, layer)
            return ConvertedLayer(name, layer.rank, layer.rank, 0.0, 0.0)
        lora = as_lora(layer, rank=self.truncate.rank, tolerance=self.truncate.tolerance)
        up, down, _ = LORA[0] if self.to == "kohya" else LORA[1]
        self._writer.add(f"{name}.{down}", lora.down)
        self._writer.add(f"{name}.{up}", lora.up)
        if self.to == "kohya":
            self._writer.add(f"{name}.{ALPHA}", torch.tensor(float(lora.rank)))
        return ConvertedLayer(name, lora.rank, lora.exact_rank, lora.error, lora.norm)

    def pass_on(self, group: Group, tensors: Mapping[str, Tensor]) -> None:
        """Write a layer of another method as it is."""
        if self.wants_dots and group.prefix.underscored:
            raise ConversionError(
                f"{group.module} is passed on as it is, and its name has underscores for dots: "
                "convert to kohya or lycoris"
            )
        name = self._start(group.prefix.component, group.prefix.text) + self._spelt(group.name)
        for factor, tensor in tensors.items():
            self._writer.add(f"{name}.{factor}", tensor)

    def add_rest(self, key: str, tensor: Tensor) -> None:
        """Write a tensor that is no layer's, as it is."""
        self._writer.add(key, tensor)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the file; kohya's and LyCORIS's have hashes of their own."""
        self._writer.finish(metadata, hashes=self.to in ("kohya", "lycoris"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def _add_loha(self, name: str, layer: Layer) -> None:
        if not layer.is_loha:
            raise ConversionError(
                f"{layer.name} is {layer.parameterization!r}, which LoHa has no form for: convert "
                "to lora or kohya, or pass the layer on as it is (others='keep')"
            )
        if not layer.alpha:
            raise ConversionError(
                f"{layer.name} has alpha 0, so its ΔW is 0, and readers of {self.to!r} files "
                "take 0 for a fault: leave the layer out, or give it another alpha"
            )
        for key, factor in loha_factors(layer, conv1d_as_2d=False).items():
            self._writer.add(f"{name}.{key}", factor)
        alpha = layer.alpha_tensor
        self._writer.add(f"{name}.{ALPHA}", torch.tensor(layer.alpha) if alpha is None else alpha)
        if layer.dora_scale is not None:
            self._writer.add(f"{name}.{DORA}", layer.dora_scale)

    def _spelt(self, name: str) -> str:
        return name if self.wants_dots else name.replace(".", "_")

    def _start(self, component: str, source: str) -> str:
        """The prefix: the one that was asked for, else the source's, else the component's."""
        if self.prefix is not None:
            return self.prefix
        if source and source != WRAPPER_PREFIX and source.endswith("_") != self.wants_dots:
            return source
        if not component and self.to in ("lora", "kohya"):
            named = "'unet.' or 'transformer.'" if self.wants_dots else "'lora_unet_'"
            raise ConversionError(
                f"the source does not say which part of a pipeline it is for: give prefix={named}, "
                "or '' for none"
            )
        if self.wants_dots:
            return f"{component}." if component else ""
        if component == "text_encoder" and self._several:
            return "lora_te1_"
        return _UNDERSCORED[component]


def loha_factors(layer: Layer, *, conv1d_as_2d: bool) -> dict[str, Tensor]:
    """A layer's factors by LoHa's names.

    Args:
        layer: a Hadamard product of two halves.
        conv1d_as_2d: keep a Conv1d's core as ``k x 1``, as PEFT does.
    """
    found = {}
    for half, (a, b, core) in zip(layer.halves, LOHA, strict=True):
        x, y, t = half
        found[a] = x if t is None else x.T
        found[b] = y.T
        if t is not None:
            found[core] = t.unsqueeze(-1) if conv1d_as_2d and t.dim() == 3 else t
    return {name: factor.contiguous() for name, factor in found.items()}
