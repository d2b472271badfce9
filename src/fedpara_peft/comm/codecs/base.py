"""What a codec is, and codecs one after the other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ...maths.precision import wide
from ..errors import CodecError
from ..schema import Schema, TensorSchema
from ..state import State


class Codec(ABC):
    """A map from states to states that are shorter to send, and back.

    A codec transforms floating-point tensors; integers (which positions a codec before it kept)
    pass through. What it sends has a length that follows from the schema alone. What must not be
    changed, buffers above all, never comes to it (see :class:`~..payload.Format`).

    One of your own is given to ``uplink_codec`` or ``downlink_codec`` as it is. A run is known by
    its text (``str``), which is in settings, checkpoints and every payload; another text is another
    codec. :func:`~fedpara_peft.testing.check_codec` tries all that is said here.
    """

    @property
    def dense(self) -> bool:
        """Whether every entry survives in some form; else it suits updates but not weights."""
        return True

    @property
    def lossless(self) -> bool:
        """Whether what comes back is what was sent, bit for bit.

        Then nothing need be encoded in a simulation, and there is no loss to make up for.
        """
        return False

    def error(self, tensor: torch.Tensor) -> float:
        """The largest ‖x̂ - x‖ that sending a tensor x may cost, rounding in its dtype left out.

        By default ‖x‖, which is what sending nothing costs: whatever loses more had better not be
        sent at all.
        """
        return float(wide(tensor).norm())

    @abstractmethod
    def wire(self, name: str, entry: TensorSchema) -> Schema:
        """The tensors that a floating-point tensor is sent as: ``name``, or ``name.<part>``."""

    @abstractmethod
    def encode(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> State:
        """Make them.

        Args:
            name: the tensor's.
            tensor: on the CPU; not to be changed.
            generator: all randomness there is; derived from round and client.
        """

    @abstractmethod
    def decode(self, name: str, wire: State, entry: TensorSchema) -> torch.Tensor:
        """The inverse, as far as there is one.

        Raises:
            PayloadError: what arrived cannot have been made by :meth:`encode`.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The same for the same codec in every process, another for another."""

    # Whole states.

    def wire_schema(self, schema: Schema) -> Schema:
        """The schema of what is sent for states of a schema.

        Raises:
            CodecError: two tensors of it would have one name.
        """
        found: Schema = {}
        for name, entry in schema.items():
            made = self.wire(name, entry) if entry.is_float else {name: entry}
            if twice := made.keys() & found.keys():
                raise CodecError(
                    f"{self} cannot come after a codec that sends {sorted(twice)[0]!r}, too: its "
                    "own would replace it; leave one of them out"
                )
            found.update(made)
        return found

    def encode_state(self, state: State, generator: torch.Generator) -> State:
        """Encode every tensor, in the state's order."""
        found: State = {}
        for name, tensor in state.items():
            floats = tensor.is_floating_point()
            found.update(self.encode(name, tensor, generator) if floats else {name: tensor})
        return found

    def decode_state(self, wire: State, schema: Schema) -> State:
        """Decode every tensor."""
        found: State = {}
        for name, entry in schema.items():
            if entry.is_float:
                part = {n: wire[n] for n in self.wire(name, entry)}
                found[name] = self.decode(name, part, entry)
            else:
                found[name] = wire[name]
        return found


@dataclass(frozen=True)
class Identity(Codec):
    """Tensors as they are."""

    @property
    def lossless(self) -> bool:
        """See :class:`Codec`."""
        return True

    def error(self, tensor: torch.Tensor) -> float:
        """See :class:`Codec`."""
        return 0.0

    def wire(self, name: str, entry: TensorSchema) -> Schema:
        """See :class:`Codec`."""
        return {name: entry}

    def encode(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> State:
        """See :class:`Codec`."""
        return {name: tensor}

    def decode(self, name: str, wire: State, entry: TensorSchema) -> torch.Tensor:
        """See :class:`Codec`."""
        return wire[name]

    def __str__(self) -> str:
        return "identity"


class Chain(Codec):
    """Codecs one after the other: each transforms what the one before it sends.

    Args:
        codecs: at least one.

    Raises:
        CodecError: one calls a tensor that it sends as one before it does.
    """

    def __init__(self, *codecs: Codec) -> None:
        self.codecs = codecs
        self.wire("x", TensorSchema((1,), torch.float32))

    @property
    def dense(self) -> bool:
        """See :class:`Codec`."""
        return all(codec.dense for codec in self.codecs)

    @property
    def lossless(self) -> bool:
        """See :class:`Codec`."""
        return all(codec.lossless for codec in self.codecs)

    def error(self, tensor: torch.Tensor) -> float:
        """What each loses of what the ones before it send, where decoding does not enlarge it."""
        wire: State = {"x": tensor}
        found = 0.0
        for codec in self.codecs:
            floats = [part for part in wire.values() if part.is_floating_point()]
            found += math.hypot(*map(codec.error, floats))
            wire = codec.encode_state(wire, torch.Generator())
        return found

    def wire(self, name: str, entry: TensorSchema) -> Schema:
        """See :class:`Codec`."""
        schema: Schema = {name: entry}
        for codec in self.codecs:
            schema = codec.wire_schema(schema)
        return schema

    def encode(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> State:
        """See :class:`Codec`."""
        state: State = {name: tensor}
        for codec in self.codecs:
            state = codec.encode_state(state, generator)
        return state

    def decode(self, name: str, wire: State, entry: TensorSchema) -> torch.Tensor:
        """See :class:`Codec`."""
        schemas: list[Schema] = [{name: entry}]
        for codec in self.codecs:
            schemas.append(codec.wire_schema(schemas[-1]))
        for codec, schema in zip(reversed(self.codecs), reversed(schemas[:-1]), strict=True):
            wire = codec.decode_state(wire, schema)
        return wire[name]

    def __str__(self) -> str:
        return "+".join(map(str, self.codecs))
