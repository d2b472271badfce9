"""Schemas: what both ends know of a payload before it travels."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSchema:
    """Shape and dtype that a tensor of a payload must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.numel * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.is_floating_point

    @property
    def real(self) -> TensorSchema:
        """Of real and imaginary parts, a last dimension of 2; its own where it is real."""
        if not self.dtype.is_complex:
            return self
        return TensorSchema((*self.shape, 2), self.dtype.to_real())


Schema = dict[str, TensorSchema]


def schema_of(state: Mapping[str, Tensor]) -> Schema:
    """The schema that payloads of such a state follow."""
    return {name: TensorSchema(tuple(t.shape), t.dtype) for name, t in state.items()}


def digest(schema: Schema, exact: Collection[str] = ()) -> str:
    """A short name of a schema that no other schema is likely to have.

    Args:
        schema: names, shapes and dtypes.
        exact: names that a codec leaves as they are, part of what both ends must agree on.
    """
    entries = [
        (name, entry.shape, str(entry.dtype), *(["exact"] if name in exact else []))
        for name, entry in sorted(schema.items())
    ]
    return hashlib.blake2b(repr(entries).encode(), digest_size=8).hexdigest()
