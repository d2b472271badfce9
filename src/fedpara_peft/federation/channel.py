"""The way between server and clients: codecs, error feedback, and how long payloads are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ..comm.codecs import Identity, codec_from_name
from ..comm.errors import CodecError
from ..comm.feedback import encode_with_feedback
from ..comm.ledger import Direction
from ..comm.payload import Format, Payload, PayloadSize
from ..comm.schema import schema_of
from ..comm.state import State
from .arguments import FederatedArguments
from .random import torch_generator
from .state import Broadcast, ClientState, ClientUpdate, ServerState
from .strategies import LocalSteps, Strategy


@dataclass(frozen=True)
class Sent:
    """A broadcast on its way.

    Attributes:
        broadcast: what the clients receive.
        server: the server with its new residual.
        size: the payload's length.
        payload: the payload, where one was made.
    """

    broadcast: Broadcast
    server: ServerState
    size: PayloadSize
    payload: Payload | None


class Channel:
    """Sends states through the codecs of a run.

    With the identity codec nothing need be encoded: what arrives is what was sent, and a payload's
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

    @staticmethod
    def joined(main: State, extra: Mapping[str, State]) -> State:
        """A state and what the strategy sends beside it, as one."""
        beside = {f"{group}/{n}": t for group, state in extra.items() for n, t in state.items()}
        return {**main, **beside}

    @staticmethod
    def parted(
        received: State, main: State, extra: Mapping[str, State]
    ) -> tuple[State, dict[str, State]]:
        """The inverse of :meth:`joined`, on the devices of what was sent."""
        found = {n: received[n].to(t.device) for n, t in main.items()}
        beside = {
            group: {n: received[f"{group}/{n}"].to(t.device) for n, t in state.items()}
            for group, state in extra.items()
        }
        return found, beside

    def format(self, direction: Direction, main: State, extra: Mapping[str, State]) -> Format:
        """The format of such states."""
        state = self.joined(main, extra)
        key = (direction, frozenset(state))
        if key not in self._formats:
            self._formats[key] = Format(schema_of(state), self._codecs[direction])
        return self._formats[key]

    def downlink(
        self, server: ServerState, extra: Mapping[str, State], *, encode: bool = False
    ) -> Sent:
        """Send the global state and what the strategy sends beside it.

        Args:
            server: before the round.
            extra: the strategy's.
            encode: make the payload, also where its length would do.
        """
        form = self.format("downlink", server.params, extra)
        if not form.schema or (isinstance(form.codec, Identity) and not encode):
            return Sent(Broadcast(server.params, extra), server, form.size, None)
        feedback = self._feeds_back(form)
        generator = torch_generator(self._seed, server.round, "downlink codec")
        payload, received, lost = encode_with_feedback(
            form,
            self.joined(server.params, extra),
            server.residual if feedback else {},
            server.round,
            generator,
        )
        if feedback:
            server = dataclasses.replace(server, residual=lost)
        broadcast = Broadcast(*self.parted(received, server.params, extra))
        return Sent(broadcast, server, payload.size, payload)

    def uplink(
        self, update: ClientUpdate, state: ClientState, round: int, *, encode: bool = False
    ) -> tuple[ClientUpdate, ClientState, Payload | None]:
        """What the server receives, the client's state with its new residual, and the payload.

        Args:
            update: a client's.
            state: what the client keeps.
            round: rounds completed.
            encode: make the payload, also where its length would do.

        Raises:
            PayloadError: the update is not finite.
        """
        form = self.format("uplink", update.update, update.extra)
        if not form.schema or (isinstance(form.codec, Identity) and not encode):
            return update, state, None
        feedback = self._feeds_back(form)
        generator = torch_generator(self._seed, round, update.client, "uplink codec")
        residual = state.residual if feedback else {}
        sent = self.joined(update.update, update.extra)
        payload, received, lost = encode_with_feedback(form, sent, residual, round, generator)
        if feedback:
            # Names that did not travel this round keep what was lost before.
            kept = {**residual, **{name: tensor.cpu() for name, tensor in lost.items()}}
            state = dataclasses.replace(state, residual=kept)
        moved, extra = self.parted(received, update.update, update.extra)
        return dataclasses.replace(update, update=moved, extra=extra), state, payload

    def _feeds_back(self, form: Format) -> bool:
        """Whether a codec may lose something; the identity has nothing to make up for."""
        return self._feedback and not isinstance(form.codec, Identity)


def uplink_like(strategy: Strategy, part: ServerState) -> tuple[State, dict[str, State]]:
    """What updates of a round look like: names, shapes and dtypes, and the strategy's beside them.

    Args:
        strategy: the federated optimizer.
        part: the part of the server that changes in the round.
    """
    moved = {n: t for n, t in part.params.items() if n not in part.buffers}
    seen = Broadcast(part.params, strategy.broadcast(part))
    _, sent = strategy.next_client_state(seen, {}, moved, LocalSteps(1, 1.0))
    return part.params, dict(sent)
