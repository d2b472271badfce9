"""States as bytes: safetensors, checked against what was agreed on before anything is used."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..maths.precision import as_real
from .codecs import Codec, Identity
from .errors import CodecError, PayloadError
from .schema import Schema, TensorSchema, digest
from .state import State

_LENGTH_BYTES = 8
_ROUND_DIGITS = 10
# What another writer of safetensors may add to a header: padding, another order of entries.
_SLACK_BYTES = 1024
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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


@dataclass(frozen=True)
class Format:
    """What both ends agreed on: schema, codec and what it leaves alone; states to bytes and back.

    A payload is a safetensors file. Its metadata give codec, round and a digest of the schema; its
    tensors are named by their position among the schema's sorted names, because both ends know the
    rest. Sorted, so that nothing depends on the order in which an end came to know them. Complex
    tensors travel as their real and imaginary parts.

    A codec may change what is trained, for the next round makes up for it. A buffer (a running
    variance, a counter) is no parameter: int8 would make a variance negative.

    Attributes:
        schema: names, shapes and dtypes of the states.
        codec: how they are made shorter.
        exact: names that travel as they are whatever the codec: the buffers.

    Raises:
        CodecError: a payload cannot carry a tensor of such a dtype.
    """

    schema: Schema
    codec: Codec = field(default_factory=Identity)
    exact: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, entry in self.schema.items():
            if not is_carried(entry.real.dtype):
                raise CodecError(
                    f"{name} is {entry.dtype}, which no payload carries: convert it, or register "
                    "the buffer with persistent=False, so that it stays where it is"
                )

    @functools.cached_property
    def coded(self) -> frozenset[str]:
        """The names that the codec may change."""
        return frozenset(
            n for n, entry in self.schema.items() if n not in self.exact and entry.real.is_float
        )

    @functools.cached_property
    def size(self) -> PayloadSize:
        """The size of every payload, which depends on nothing else; nothing is sent for nothing."""
        if not self.schema:
            return PayloadSize(0, 0)
        tensor_bytes = sum(entry.num_bytes for entry in self._wire.values())
        return PayloadSize(len(self._header(0)), tensor_bytes)

    def encode(
        self, state: Mapping[str, Tensor], round: int = 0, generator: torch.Generator | None = None
    ) -> Payload:
        """Encode a state of the schema.

        Args:
            state: tensors on any device.
            round: number of the round it belongs to.
            generator: for stochastic codecs.
        """
        plain = {
            str(i): as_real(state[name].detach().cpu()).contiguous()
            for i, name in enumerate(self._names)
        }
        coded = {position: plain.pop(position) for position in self._coded_positions}
        wire = {**plain, **self.codec.encode_state(coded, generator or torch.Generator())}
        data = (wire[n].contiguous().reshape(-1).view(torch.uint8) for n in self._order)
        return Payload(b"".join([self._header(round), *(d.numpy().tobytes() for d in data)]))

    def decode(self, data: bytes, round: int = 0) -> State:
        """Decode bytes that arrived.

        Length, metadata, names, shapes and dtypes are compared with what was agreed on before any
        tensor is made, so bytes that claim more cost nothing.

        Args:
            data: what arrived.
            round: number of the present round.

        Returns:
            The state, on the CPU.

        Raises:
            PayloadError: it is not what was agreed on, belongs to another round, or holds NaN or
                infinity.
        """
        self._check_header(data, round)
        try:
            wire: State = load(data)
        except SafetensorError as error:
            raise PayloadError("malformed", f"{error}; ask the sender for it again") from None
        self._check_values(wire)
        state = {**wire, **self.codec.decode_state(wire, self._coded_positions)}
        self._check_values({position: state[position] for position in self._coded_positions})
        found = {name: state[str(i)] for i, name in enumerate(self._names)}
        return {
            name: torch.view_as_complex(found[name]) if entry.dtype.is_complex else found[name]
            for name, entry in self.schema.items()
        }

    @functools.cached_property
    def _names(self) -> list[str]:
        return sorted(self.schema)

    @functools.cached_property
    def _positions(self) -> Schema:
        return {str(i): self.schema[name].real for i, name in enumerate(self._names)}

    @functools.cached_property
    def _coded_positions(self) -> Schema:
        coded = {str(i) for i, name in enumerate(self._names) if name in self.coded}
        return {position: entry for position, entry in self._positions.items() if position in coded}

    @functools.cached_property
    def _wire(self) -> Schema:
        left = {n: e for n, e in self._positions.items() if n not in self._coded_positions}
        return {**left, **self.codec.wire_schema(self._coded_positions)}

    @functools.cached_property
    def _digest(self) -> str:
        return digest(self.schema, self.exact)

    @functools.cached_property
    def _order(self) -> list[str]:
        """Wide dtypes first, so that every tensor is aligned."""
        return sorted(self._wire, key=lambda name: (-self._wire[name].dtype.itemsize, name))

    def _header(self, round: int) -> bytes:
        """A safetensors header, written here so that equal states are equal bytes."""
        entries: dict[str, Any] = {"__metadata__": self._metadata(round)}
        end = 0
        for name in self._order:
            entry = self._wire[name]
            start, end = end, end + entry.num_bytes
            entries[name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text

    def _metadata(self, round: int) -> dict[str, str]:
        # A fixed width: payloads of all rounds are equally long.
        return {
            "codec": str(self.codec),
            "round": f"{round:0{_ROUND_DIGITS}d}",
            "schema": self._digest,
        }

    def _shown(self, name: str) -> str:
        """A name on the wire as the schema's owner knows it."""
        position, _, part = name.partition(".")
        known = position.isdigit() and int(position) < len(self._names)
        return (self._names[int(position)] if known else name) + (f" ({part})" if part else "")

    def _check_header(self, data: bytes, round: int) -> None:
        if len(data) > len(self.size) + _SLACK_BYTES:
            raise PayloadError("length", f"{len(data)} bytes, agreed on {len(self.size)}")
        length = int.from_bytes(data[:_LENGTH_BYTES], "little")
        if len(data) < _LENGTH_BYTES or length > len(data) - _LENGTH_BYTES:
            raise PayloadError("length", f"{len(data)} bytes end before the header does (cut off?)")
        try:
            header: dict[str, Any] = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
            metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
            found = {
                str(name): (tuple(map(int, entry["shape"])), str(entry["dtype"]))
                for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            raise PayloadError("malformed", "the header is not a payload's") from None
        self._check_metadata(metadata, round)
        self._check_entries(found)
        expected = _LENGTH_BYTES + length + sum(entry.num_bytes for entry in self._wire.values())
        if len(data) != expected:
            raise PayloadError("length", f"{len(data)} bytes, expected {expected} (cut off?)")

    def _check_metadata(self, metadata: dict[str, str], round: int) -> None:
        for reason, name, remedy in (
            ("codec", "codec", "both ends must use the same codec"),
            ("schema", "schema", "both ends must use the same model and configuration"),
            ("stale", "round", "it is of another round and must not be used in this one"),
        ):
            agreed = self._metadata(round)[name]
            if metadata.get(name) != agreed:
                raise PayloadError(
                    reason,  # type: ignore[arg-type]
                    f"{name} is {metadata.get(name, 'missing')!r:.80}, here it is {agreed!r}: "
                    f"{remedy}",
                )

    def _check_entries(self, found: dict[str, tuple[tuple[int, ...], str]]) -> None:
        missing, unexpected = self._wire.keys() - found.keys(), found.keys() - self._wire.keys()
        if missing or unexpected:
            raise PayloadError(
                "keys",
                f"{len(missing)} tensors missing {[self._shown(n) for n in sorted(missing)[:3]]}, "
                f"{len(unexpected)} unexpected {[n[:80] for n in sorted(unexpected)[:3]]}",
            )
        for name, (shape, dtype) in found.items():
            agreed: TensorSchema = self._wire[name]
            if shape != agreed.shape:
                raise PayloadError(
                    "shape", f"{self._shown(name)} is {shape!s:.80}, agreed on {agreed.shape}"
                )
            if _DTYPES.get(dtype) != agreed.dtype:
                raise PayloadError(
                    "dtype", f"{self._shown(name)} is {dtype[:80]}, agreed on {agreed.dtype}"
                )

    def _check_values(self, state: State) -> None:
        for name, tensor in state.items():
            if not is_finite(tensor):
                beyond = "" if self.codec.lossless else f", or it is beyond what {self.codec} holds"
                raise PayloadError(
                    "not_finite",
                    f"{self._shown(name)} holds NaN or infinity{beyond}; lower the learning rate "
                    "or set max_grad_norm",
                )
            if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                raise PayloadError("malformed", f"{self._shown(name)} holds what is no truth value")


def is_carried(dtype: torch.dtype) -> bool:
    """Whether payloads can hold tensors of a dtype."""
    return dtype in _NAMES


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, whatever its dtype."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch cannot compute in eight bits
    # A finite norm says yes at a fraction of the cost; an infinite one may be an overflow.
    return math.isfinite(torch.linalg.vector_norm(wide)) or bool(torch.isfinite(wide).all())
