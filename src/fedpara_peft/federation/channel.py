"""The way between server and clients: codecs, error feedback, and how long payloads are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..comm.codecs import Identity, codec_from_name
from ..comm.errors import CodecError
from ..comm.feedback import encode_with_feedback
from ..comm.ledger import Direction
from ..comm.payload import Format, PayloadSize
from ..comm.schema import schema_of
from ..comm.state import State
from .arguments import FederatedArguments
from .random import torch_generator
from .state import Broadcast, ClientState, ClientUpdate, ServerState


class Channel:
    """Sends states through the codecs of a run.

    With the identity codec nothing is encoded: what arrives is what was sent, and a payload's
    length follows from its schema.

    Args:
        args: the run's settings.

    Raises:
        CodecError: a codec does not exist, or would lose most of the weights on the downlink.
    """

    def __init__(self, args: FederatedArguments) -> None:
        self._seed = args.seed
        self._feedback = args.error_feedback
        self._codecs = {
            "uplink": codec_from_name(args.uplink_codec),
            "downlink": codec_from_name(args.downlink_codec),
        }
        if not self._codecs["downlink"].dense:
            raise CodecError(
                f"downlink_codec={args.downlink_codec!r} drops entries of the weights themselves: "
                "use float16, bfloat16, int8 or int4"
            )
        self._formats: dict[tuple[str, frozenset[str]], Format] = {}

    def format(self, direction: Direction, state: State) -> Format:
        """The format of states with these names."""
        key = (direction, frozenset(state))
        if key not in self._formats:
            self._formats[key] = Format(schema_of(state), self._codecs[direction])
        return self._formats[key]

    def size(self, direction: Direction, main: State, extra: Mapping[str, State]) -> PayloadSize:
        """The length of every payload of such a state."""
        return self.format(direction, wire_state(main, extra)).size

    def downlink(
        self, server: ServerState, extra: Mapping[str, State]
    ) -> tuple[Broadcast, ServerState, PayloadSize]:
        """What clients receive, the server with its new residual, and the payload's size."""
        sent = wire_state(server.params, extra)
        form = self.format("downlink", sent)
        if isinstance(form.codec, Identity) or not sent:
            return Broadcast(server.params, extra), server, form.size
        generator = torch_generator(self._seed, server.round, "downlink codec")
        residual = server.residual if self._feedback else {}
        payload, received, lost = encode_with_feedback(
            form, sent, residual, server.round, generator
        )
        if self._feedback:
            server = dataclasses.replace(server, residual=lost)
        params, extra = unwired(received, server.params, extra)
        return Broadcast(params, extra), server, payload.size

    def uplink(
        self, update: ClientUpdate, state: ClientState, round: int
    ) -> tuple[ClientUpdate, ClientState]:
        """What the server receives, and the client's state with its new residual.

        Raises:
            PayloadError: the update is not finite.
        """
        sent = wire_state(update.update, update.extra)
        form = self.format("uplink", sent)
        if isinstance(form.codec, Identity) or not sent:
            return update, state
        generator = torch_generator(self._seed, round, update.client, "uplink codec")
        residual = state.residual if self._feedback else {}
        _, received, lost = encode_with_feedback(form, sent, residual, round, generator)
        if self._feedback:
            # Names that did not travel this round keep what was lost before.
            kept = {**residual, **{name: tensor.cpu() for name, tensor in lost.items()}}
            state = dataclasses.replace(state, residual=kept)
        moved, extra = unwired(received, update.update, update.extra)
        return dataclasses.replace(update, update=moved, extra=extra), state


def wire_state(main: State, extra: Mapping[str, State]) -> State:
    """A state and what the strategy sends beside it, as one."""
    beside = {f"{group}/{n}": t for group, state in extra.items() for n, t in state.items()}
    return {**main, **beside}


def unwired(
    received: State, main: State, extra: Mapping[str, State]
) -> tuple[State, dict[str, State]]:
    """The inverse of :func:`wire_state`, on the devices of what was sent."""
    found = {n: received[n].to(t.device) for n, t in main.items()}
    beside = {
        group: {n: received[f"{group}/{n}"].to(t.device) for n, t in state.items()}
        for group, state in extra.items()
    }
    return found, beside
