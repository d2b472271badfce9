"""Uniform stochastic quantization, as FedPAQ uploads it (Reisizadeh et al., arXiv:1909.13014)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...maths.precision import wide
from ..errors import PayloadError
from ..schema import Schema, TensorSchema
from ..state import State
from .base import Codec
from .named import register


@dataclass(frozen=True)
class Quantize(Codec):
    """Integers of a few bits and one scale a tensor, unbiased.

        q = ⌊s x / c + u⌋,   x̂ = c q / s,   c = max |x|,   s = 2^(bits - 1) - 1,   u ~ U[0, 1)
        E x̂ = x,   |x̂ - x| ≤ c / s

    Attributes:
        bits: 8, or 4 (two to a byte).
    """

    bits: int

    @property
    def levels(self) -> int:
        """s, the largest code: codes are -s to s."""
        return 2 ** (self.bits - 1) - 1

    def error(self, tensor: torch.Tensor) -> float:
        """See :class:`Codec`."""
        c = float(tensor.abs().max()) if tensor.numel() else 0.0
        return c / self.levels * math.sqrt(tensor.numel())

    def wire(self, name: str, entry: TensorSchema) -> Schema:
        """See :class:`Codec`."""
        num_bytes = -(-entry.numel * self.bits // 8)
        return {
            name: TensorSchema((num_bytes,), torch.uint8),
            f"{name}.c": TensorSchema((), torch.float32),
        }

    def encode(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> State:
        """See :class:`Codec`."""
        exact = wide(tensor).reshape(-1)
        c = (exact.abs().max() if exact.numel() else exact.sum()).float()
        # Rounded up where float32 is too coarse, so that no value is beyond the last level.
        if c.double() < (exact.abs().max() if exact.numel() else 0):
            c = torch.nextafter(c, torch.tensor(torch.inf))
        q = torch.zeros_like(exact)
        if c > 0:
            u = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
            q = (exact / c.double() * self.levels + u).floor()
        codes = (q.clamp(-self.levels, self.levels) + self.levels).to(torch.uint8)
        return {name: _packed(codes) if self.bits == 4 else codes, f"{name}.c": c}

    def decode(self, name: str, wire: State, entry: TensorSchema) -> torch.Tensor:
        """See :class:`Codec`."""
        codes, c = wire[name], wire[f"{name}.c"]
        if self.bits == 4:
            codes = _unpacked(codes, entry.numel)
        if c < 0 or bool((codes > 2 * self.levels).any()):
            raise PayloadError("malformed", f"{name} holds codes beyond the last of int{self.bits}")
        values = (wide(codes) - self.levels) * (wide(c) / self.levels)
        return values.to(entry.dtype).reshape(entry.shape)

    def __str__(self) -> str:
        return f"int{self.bits}"


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes to a byte, the first in the low half."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[0::2] | (codes[1::2] << 4)


def _unpacked(data: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([data & 15, data >> 4], 1).reshape(-1)[:count]


register("int8", Quantize(8))
register("int4", Quantize(4))
