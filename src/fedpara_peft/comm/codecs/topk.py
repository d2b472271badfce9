"""Sparsification: the largest entries alone (Aji and Heafield, arXiv:1704.05021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...maths.precision import wide
from ..errors import CodecError, PayloadError
from ..schema import Schema, TensorSchema
from ..state import State
from .base import Codec
from .named import register

_BITS = 1 << torch.arange(8)


@dataclass(frozen=True)
class TopK(Codec):
    """Send the entries of largest magnitude of each tensor, and which they are.

        ‖x̂ - x‖² ≤ (1 - k/n) ‖x‖²,   k = ⌈fraction · n⌉

    Which they are travels as indices of 4 bytes, or as a bit an entry where that is shorter.

    Attributes:
        fraction: of the entries, in (0, 1].

    Raises:
        CodecError: it is not.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise CodecError(f"topk needs a fraction in (0, 1], got {self.fraction}")

    @property
    def dense(self) -> bool:
        """See :class:`Codec`."""
        return False

    def error(self, tensor: torch.Tensor) -> float:
        """See :class:`Codec`."""
        left = tensor.numel() - self._count(tensor.numel())
        return float(wide(tensor).norm()) * math.sqrt(left / max(1, tensor.numel()))

    def wire(self, name: str, entry: TensorSchema) -> Schema:
        """See :class:`Codec`."""
        k = self._count(entry.numel)
        where = TensorSchema((k,), torch.int32)
        if _as_mask(k, entry.numel):
            where = TensorSchema((-(-entry.numel // 8),), torch.uint8)
        return {name: TensorSchema((k,), entry.dtype), f"{name}.i": where}

    def encode(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> State:
        """See :class:`Codec`."""
        flat = tensor.reshape(-1)
        k = self._count(flat.numel())
        chosen = flat.abs().topk(k).indices.sort().values
        where = chosen.to(torch.int32)
        if _as_mask(k, flat.numel()):
            mask = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.int64)
            mask[chosen] = 1
            where = (mask.view(-1, 8) * _BITS).sum(1).to(torch.uint8)
        return {name: flat[chosen], f"{name}.i": where}

    def decode(self, name: str, wire: State, entry: TensorSchema) -> torch.Tensor:
        """See :class:`Codec`."""
        values, where = wire[name], wire[f"{name}.i"]
        chosen = where.long()
        if where.dtype == torch.uint8:
            chosen = ((where[:, None].long() & _BITS) > 0).reshape(-1).nonzero().reshape(-1)
        ascending = bool((chosen[1:] > chosen[:-1]).all())
        inside = not chosen.numel() or bool(chosen[0] >= 0 and chosen[-1] < entry.numel)
        if len(chosen) != len(values) or not ascending or not inside:
            raise PayloadError(
                "malformed", f"{name} does not name {len(values)} of {entry.numel} entries"
            )
        flat = torch.zeros(entry.numel, dtype=entry.dtype)
        flat[chosen] = values
        return flat.reshape(entry.shape)

    def _count(self, numel: int) -> int:
        return math.ceil(self.fraction * numel)

    def __str__(self) -> str:
        return f"topk:{float(self.fraction)}".removesuffix(".0")


def _as_mask(k: int, numel: int) -> bool:
    return 32 * k > numel


register("topk:FRACTION", lambda fraction: TopK(float(fraction)))
