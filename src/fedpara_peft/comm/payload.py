"""States as bytes: safetensors, checked against an agreed schema before anything is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import PayloadError
from .state import State

_LENGTH_BYTES = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSchema:
    """Shape and dtype that a tensor of a payload must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Schema = dict[str, TensorSchema]


def schema_of(state: Mapping[str, Tensor]) -> Schema:
    """The schema that payloads of such a state follow."""
    return {name: TensorSchema(tuple(t.shape), t.dtype) for name, t in state.items()}


@dataclass(frozen=True)
class PayloadSize:
    """How long a payload is.

    Attributes:
        header_bytes: names, shapes, dtypes and metadata.
        tensor_bytes: the tensors' data.
    """

    header_bytes: int
    tensor_bytes: int

    def __len__(self) -> int:
        return self.header_bytes + self.tensor_bytes


@dataclass(frozen=True)
class Payload:
    """What is sent.

    Attributes:
        data: safetensors bytes.
    """

    data: bytes

    def __len__(self) -> int:
        return len(self.data)

    @property
    def size(self) -> PayloadSize:
        """Its length, by parts."""
        header = _LENGTH_BYTES + int.from_bytes(self.data[:_LENGTH_BYTES], "little")
        return PayloadSize(header, len(self.data) - header)


def size_of(schema: Schema) -> PayloadSize:
    """The size of every payload of a schema, which depends on nothing else.

    Nothing is sent for an empty schema.
    """
    if not schema:
        return PayloadSize(0, 0)
    return encode({n: torch.zeros(s.shape, dtype=s.dtype) for n, s in schema.items()}).size


def encode(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Payload:
    """Encode a state as safetensors bytes; bit-exact, tensors on any device."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return Payload(save(tensors, dict(metadata) if metadata else None))


def decode(data: bytes, schema: Schema) -> State:
    """Decode bytes that follow a schema.

    Header and length are compared with the schema before any tensor is made, so bytes that claim
    more than was agreed on cost nothing.

    Args:
        data: what arrived.
        schema: names, shapes and dtypes agreed on.

    Returns:
        The state, on the CPU.

    Raises:
        PayloadError: not safetensors, other names, shapes or dtypes, truncated or overlong, or
            holding NaN or infinity.
    """
    _check_header(data, schema)
    try:
        state: State = load(data)
    except SafetensorError as error:
        raise PayloadError("malformed", f"{error}; ask the sender for it again") from None
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PayloadError(
                "not_finite",
                f"{name} holds NaN or infinity; lower the learning rate or set max_grad_norm",
            )
    return {name: state[name] for name in schema}


def _check_header(data: bytes, schema: Schema) -> None:
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or length > len(data) - _LENGTH_BYTES:
        raise PayloadError("length", f"{len(data)} bytes end before the header does (truncated?)")
    try:
        header: dict[str, Any] = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
        header.pop("__metadata__", None)
        found = {
            str(name): (tuple(map(int, entry["shape"])), str(entry["dtype"]))
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise PayloadError("malformed", "the header is not safetensors'") from None
    missing, unexpected = schema.keys() - found.keys(), found.keys() - schema.keys()
    if missing or unexpected:
        raise PayloadError(
            "keys",
            f"{len(missing)} tensors missing {sorted(missing)[:3]}, {len(unexpected)} unexpected "
            f"{sorted(unexpected)[:3]}; sender and receiver must use the same model and config",
        )
    for name, (shape, dtype) in found.items():
        if shape != schema[name].shape:
            raise PayloadError("shape", f"{name} is {shape}, agreed on {schema[name].shape}")
        if _DTYPES.get(dtype) != schema[name].dtype:
            raise PayloadError("dtype", f"{name} is {dtype}, agreed on {schema[name].dtype}")
    expected = _LENGTH_BYTES + length + sum(entry.num_bytes for entry in schema.values())
    if len(data) != expected:
        raise PayloadError("length", f"{len(data)} bytes, expected {expected} (truncated?)")
