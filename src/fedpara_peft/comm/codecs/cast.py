"""Half precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...maths.precision import wide
from ..schema import Schema, TensorSchema
from ..state import State
from .base import Codec
from .named import register


@dataclass(frozen=True)
class Cast(Codec):
    """Round to the nearest number of a narrower dtype.

        |x̂ - x| ≤ 2⁻¹¹ |x|  float16 (normal range),   2⁻⁸ |x|  bfloat16

    Attributes:
        dtype: float16 or bfloat16.
    """

    dtype: torch.dtype

    def error(self, tensor: torch.Tensor) -> float:
        """See :class:`Codec`; numbers below the normal range lose up to half of the smallest."""
        info = torch.finfo(self.dtype)
        bound = wide(tensor).abs() * (info.eps / 2)
        return float(bound.clamp_min(info.smallest_normal * info.eps / 2).norm())

    def wire(self, name: str, entry: TensorSchema) -> Schema:
        """See :class:`Codec`."""
        return {name: TensorSchema(entry.shape, self.dtype)}

    def encode(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> State:
        """See :class:`Codec`."""
        return {name: tensor.to(self.dtype)}

    def decode(self, name: str, wire: State, entry: TensorSchema) -> torch.Tensor:
        """See :class:`Codec`."""
        return wire[name].to(entry.dtype)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


register("float16", Cast(torch.float16))
register("bfloat16", Cast(torch.bfloat16))
