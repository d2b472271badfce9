"""Writing layers as a folder that PEFT loads: LoRA, LoHa or FedPara."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from peft import LoHaConfig, LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..._peft import WRAPPER_PREFIX
from ...config import FedParaConfig
from ...errors import ConversionError
from ...layer import half_containers
from ...names import exact_pattern
from .keys import LORA, Group
from .layer import Layer, as_lora
from .stream import TensorWriter
from .writers import ConvertedLayer, Truncate, loha_factors


class FolderWriter:
    """An adapter's folder: configuration and weights, over a base model that is frozen.

    Args:
        folder: the folder.
        to: ``"lora"``, ``"loha"`` or ``"fedpara"``.
        truncate: how much of a LoRA is kept.
        others: names of the base model's other modules where they are known: a listed name is
            PEFT's for every module whose name ends in it.
        settings: what the source's configuration has for the target's, dropout and the like.
    """

    wants_dots = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        to: str,
        truncate: Truncate,
        others: Collection[str] | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder, self.to, self.truncate = Path(folder), to, truncate
        self.others, self.settings = others, dict(settings)
        self.config: Any = None
        self._writer = TensorWriter(self.folder / SAFETENSORS_WEIGHTS_NAME)
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}
        self._transposed = False
        #: Whether kernels are in Tucker form; None while no layer has told.
        self._effective: bool | None = None
        self._form: str | None = None

    def add(self, layer: Layer, prefix: str | None) -> ConvertedLayer:
        """Convert and write one layer."""
        lora = None
        if self.to == "lora":
            lora = as_lora(layer, rank=self.truncate.rank, tolerance=self.truncate.tolerance)
            down, up = lora.down, lora.up
            self._transposed |= layer.transposed
            if layer.embedding:
                factors = {"lora_embedding_A": down, "lora_embedding_B": up}
            else:
                factors = {LORA[1][1]: down, LORA[1][0]: up}
            rank, alpha = lora.rank, float(lora.rank)
        else:
            factors = self._products(layer)
            rank, alpha = layer.rank, layer.alpha
        for name, factor in factors.items():
            self._writer.add(f"{WRAPPER_PREFIX}{layer.name}.{name}", factor)
        self._ranks[layer.name], self._alphas[layer.name] = rank, alpha
        if lora is None:
            return ConvertedLayer(layer.name, rank, rank, 0.0, 0.0)
        return ConvertedLayer(layer.name, rank, lora.exact_rank, lora.error, lora.norm)

    def add_rest(self, key: str, tensor: Tensor) -> None:
        """Write a tensor that is no layer's: a bias, a module that is saved whole."""
        self._writer.add(key, tensor)

    def pass_on(self, group: Group, tensors: Mapping[str, Tensor]) -> None:
        """Refused: a folder holds one method."""
        raise ConversionError(
            f"{group.module} is a {group.method}, and a folder of PEFT's holds one method: convert "
            "to a file (kohya, lycoris, or a target that ends in .safetensors)"
        )

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write both files."""
        self.config = self._configuration()
        self._writer.finish({**metadata, "format": "pt"})
        self.config.save_pretrained(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def _products(self, layer: Layer) -> dict[str, Tensor]:
        if layer.dora_scale is not None:
            raise ConversionError(
                f"{layer.name} has a dora_scale, which PEFT's LoHa and FedPara have no place for: "
                "write it as lycoris, or merge it"
            )
        if layer.embedding or not (layer.is_loha or self.to == "fedpara"):
            kind = "an embedding" if layer.embedding else repr(layer.parameterization)
            raise ConversionError(
                f"{layer.name} is {kind}, which {self.to} has no form for: convert to lora"
            )
        if self.to == "loha" and (layer.transposed or _kernel_dims(layer) == 3):
            kind = "transformers' Conv1D" if layer.transposed else "a Conv3d"
            raise ConversionError(
                f"{layer.name} is {kind}, which PEFT's LoHa has no form for: convert to fedpara or "
                "lora"
            )
        if self._form not in (None, layer.parameterization):
            raise ConversionError(
                f"{layer.name} is {layer.parameterization!r} and layers before it are "
                f"{self._form!r}: one FedPara adapter has one parameterization; convert to lora"
            )
        self._form = layer.parameterization
        # Of a matrix that no base model explains nothing is known; a 1x1 kernel is one in any case.
        if layer.has_core or (layer.kernel and max(layer.kernel) > 1):
            if self._effective not in (None, layer.has_core):
                raise ConversionError(
                    f"{layer.name}: some kernels are in Tucker form and some are matrices, and an "
                    "adapter of PEFT's has one for all (use_effective_conv2d): convert to lora"
                )
            self._effective = layer.has_core
        if self.to == "loha":
            return loha_factors(layer, conv1d_as_2d=True)
        found = {}
        for i, half in enumerate(layer.halves):
            for container, factor in zip(half_containers(i), half, strict=True):
                if factor is not None:
                    found[f"{container}.weight"] = factor.contiguous()
        return found

    def _configuration(self) -> Any:
        settings = dict(self.settings)
        rank = settings.pop("r", max(self._ranks.values()))
        alpha = settings.pop("alpha", max(self._alphas.values()))
        ranks = {exact_pattern(n): r for n, r in self._ranks.items() if r != rank}
        alphas = {exact_pattern(n): a for n, a in self._alphas.items() if a != alpha}
        shared = {"target_modules": self._targets(), "inference_mode": True, **settings}
        if self.to == "lora":
            return LoraConfig(
                r=rank, lora_alpha=rank, rank_pattern=ranks, alpha_pattern=dict(ranks),
                fan_in_fan_out=self._transposed, **shared,
            )  # fmt: skip
        own = {
            "r": rank, "alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas,
            "use_effective_conv2d": bool(self._effective), **shared,
        }  # fmt: skip
        if self.to == "loha":
            return LoHaConfig(**own)
        return FedParaConfig(parameterization=str(self._form), **own)

    def _targets(self) -> list[str] | str:
        """``target_modules`` that match these layers and no others."""
        names = sorted(self._ranks)
        endings = tuple(f".{name}" for name in names)
        others = None if self.others is None else set(self.others).difference(names)
        if others is not None and not any(name.endswith(endings) for name in others):
            return names
        return "|".join(re.escape(name) for name in names)


def _kernel_dims(layer: Layer) -> int:
    core = layer.halves[0].t
    return core.dim() - 2 if core is not None else len(layer.kernel or ())
