"""The way between server and clients: what travels, codecs, error feedback, lengths of payloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...comm.codecs import as_codec, codec_names
from ...comm.errors import CodecError
from ...comm.feedback import encode_with_feedback
from ...comm.ledger import Direction
from ...comm.payload import Format, Payload, PayloadSize
from ...comm.schema import Schema, schema_of
from ...comm.state import State
from ..arguments import FederatedArguments
from ..errors import ArgumentsError
from ..random import torch_generator
from ..state import Broadcast, ClientUpdate, ServerState
from ..strategies import Strategy
from .admission import require_finite
from .ranks import ClientRanks, Level

#: What a state file or a message calls its own parts.
_RESERVED = {"update", "buffers", "params", "local", "residual"}


@dataclass(frozen=True)
class Layout:
    """What travels one way in a round, as both ends know it before anything does.

    Attributes:
        params: names of the parameters.
        buffers: names of the buffers, which travel exact.
        groups: what the strategy sends beside them.
        trained: names that every group has: the parameters that train in the round.
        form: the payload's format.
    """

    params: tuple[str, ...]
    buffers: tuple[str, ...]
    groups: tuple[str, ...]
    trained: tuple[str, ...]
    form: Format

    def joined(self, tensors: State, extra: Mapping[str, State]) -> State:
        """Parameters, buffers and the strategy's groups as one state."""
        names = (*self.params, *self.buffers)
        beside = {f"{g}/{n}": extra[g][n] for g in self.groups for n in self.trained}
        return {**{n: tensors[n] for n in names}, **beside}

    def parted(self, received: State, like: State) -> tuple[State, State, dict[str, State]]:
        """The inverse of :meth:`joined`: parameters, buffers and groups.

        Args:
            received: from the payload.
            like: tensors of the same names, on whose devices they are put.
        """

        def placed(names: Collection[str], prefix: str = "") -> State:
            return {n: received[f"{prefix}{n}"].to(like[n].device) for n in names}

        groups = {group: placed(self.trained, f"{group}/") for group in self.groups}
        return placed(self.params), placed(self.buffers), groups


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

    def with_clip_norm(self, norm: float | None) -> Sent:
        """The same, but for the norm that updates will be clipped to."""
        return dataclasses.replace(
            self, broadcast=dataclasses.replace(self.broadcast, clip_norm=norm)
        )


@dataclass(frozen=True)
class Upload:
    """An update on its way.

    Attributes:
        received: what the server receives.
        residual: what the client's codec has lost so far, with error feedback.
        payload: the payload, where one was made.
    """

    received: ClientUpdate
    residual: State
    payload: Payload | None


class Channel:
    """Sends states through the codecs of a run.

    With a lossless codec nothing need be encoded: what arrives is what was sent, and a payload's
    length follows from its schema.

    Error feedback makes up for what the downlink's codec loses of anything, and for what the
    uplink's loses of the update. What a strategy sends up beside it is made anew each round from
    what the client keeps, and that follows what was received: feedback would count the loss twice.

    Args:
        args: the run's settings.
        strategy: the federated optimizer, for what it declares to send.
        ranks: which columns each client has; all by default.

    Attributes:
        ranks: likewise.

    Raises:
        CodecError: a codec does not exist, or would lose most of the weights on the downlink.
        ArgumentsError: the strategy declares a group of a name that is taken.
    """

    def __init__(
        self, args: FederatedArguments, strategy: Strategy, ranks: ClientRanks | None = None
    ) -> None:
        self.ranks = ranks or ClientRanks()
        self._seed = args.seed
        self._feedback = args.error_feedback
        self._codecs = {
            "uplink": as_codec(args.uplink_codec),
            "downlink": as_codec(args.downlink_codec),
        }
        if not self._codecs["downlink"].dense:
            raise CodecError(
                f"downlink_codec={str(args.downlink_codec)!r} drops entries of the weights "
                f"themselves: use {', '.join(codec_names(dense=True))}"
            )
        self._strategy = type(strategy).__name__
        self._groups: dict[str, tuple[str, ...]] = {
            "uplink": tuple(strategy.uplink),
            "downlink": tuple(strategy.downlink),
        }
        for group in {*strategy.uplink, *strategy.downlink}:
            if group in _RESERVED or "/" in group:
                raise ArgumentsError(
                    f"{self._strategy} declares a group {group!r}: give it another name, without a "
                    f"slash and none of {sorted(_RESERVED)}"
                )
        self._layouts: dict[tuple[Direction, frozenset[str], frozenset[str], Level], Layout] = {}

    def layout(
        self,
        direction: Direction,
        server: ServerState,
        resting: Collection[str] = (),
        level: Level = None,
    ) -> Layout:
        """What travels in a round.

        Args:
            direction: all of w_t goes down; up comes what trains.
            server: names, shapes and dtypes of the global state, and which of it are buffers.
            resting: parameters that do not train in the round.
            level: the client's rank.
        """
        tensors = {n: t for n, t in server.params.items() if n not in server.remainders.names}
        trained = [n for n in tensors if n not in resting and n not in server.buffers]
        if direction == "uplink":
            tensors = {n: t for n, t in tensors.items() if n not in resting}
        return self._layout(direction, tensors, server.buffers, trained, level)

    def downlink(
        self,
        server: ServerState,
        extra: Mapping[str, State],
        resting: Collection[str] = (),
        level: Level = None,
        *,
        encode: bool = False,
    ) -> Sent:
        """Send the global state and what the strategy sends beside it.

        Args:
            server: before the round.
            extra: the strategy's.
            resting: parameters that do not train in the round.
            level: the rank of the clients that it goes to.
            encode: make the payload, also where its length would do.

        Raises:
            ArgumentsError: the strategy sends something else than it declares.
        """
        ranks = self.ranks
        layout = self.layout("downlink", server, resting, level)
        self._require_declared("downlink", extra, {n: server.params[n] for n in layout.trained})
        form = layout.form
        if not form.schema or (form.codec.lossless and not encode):
            seen = ranks.seen(Broadcast(server.params, extra), level)
            return Sent(seen, server, form.size, None)
        feedback = self._feeds_back(form)
        generator = torch_generator(self._seed, server.round, "downlink codec")
        payload, received, lost = encode_with_feedback(
            form,
            layout.joined(ranks.cut(server.params, level), ranks.cut_each(extra, level)),
            server.residual if feedback else {},
            server.round,
            generator,
        )
        if feedback:
            server = dataclasses.replace(server, residual=lost)
        params, buffers, groups = layout.parted(received, server.params)
        held = {n: server.params[n] for n in server.remainders.names}
        found = {**ranks.padded({**params, **buffers}, level), **held}
        broadcast = Broadcast(
            {n: found[n] for n in server.params}, ranks.padded_each(groups, level)
        )
        return Sent(broadcast, server, payload.size, payload)

    def uplink(
        self, update: ClientUpdate, residual: State, round: int, *, encode: bool = False
    ) -> Upload:
        """Send a client's update, its buffers and what the strategy sends beside them.

        Args:
            update: a client's.
            residual: what its codec has lost so far.
            round: rounds completed.
            encode: make the payload, also where its length would do.

        Raises:
            ArgumentsError: the strategy sends something else than it declares, or the update is of
                more columns than the client has.
            PayloadError: the update is not finite, or too large for the codec.
        """
        self._require_declared("uplink", update.extra, update.update)
        ranks, level = self.ranks, self.ranks.level(update.client)
        if level is not None:
            require_finite(update)
            ranks.require_cut(update.update, level)
        layout = self._of(update)
        form = layout.form
        if not form.schema or (form.codec.lossless and not encode):
            return Upload(update, residual, None)
        require_finite(update)
        tensors = {**update.update, **update.buffers}
        generator = torch_generator(self._seed, round, update.client, "uplink codec")
        feedback = self._feeds_back(form)
        payload, received, lost = encode_with_feedback(
            form,
            layout.joined(ranks.cut(tensors, level), ranks.cut_each(update.extra, level)),
            ranks.cut(residual, level) if feedback else {},
            round,
            generator,
            update.update if feedback else (),
        )
        if feedback:
            # Names that did not travel this round keep what was lost before.
            lost = ranks.padded(lost, level)
            residual = {**residual, **{name: tensor.cpu() for name, tensor in lost.items()}}
        moved, buffers, extra = layout.parted(received, tensors)
        arrived = dataclasses.replace(
            update,
            update=ranks.padded(moved, level),
            buffers=buffers,
            extra=ranks.padded_each(extra, level),
        )
        return Upload(arrived, residual, payload)

    def uplink_size(self, update: ClientUpdate) -> PayloadSize:
        """How long an update's payload is."""
        return self._of(update).form.size

    def _of(self, update: ClientUpdate) -> Layout:
        tensors = {**update.update, **update.buffers}
        level = self.ranks.level(update.client)
        return self._layout("uplink", tensors, update.buffers, update.update, level)

    def _layout(
        self,
        direction: Direction,
        tensors: State,
        buffers: Collection[str],
        trained: Collection[str],
        level: Level,
    ) -> Layout:
        key = (direction, frozenset(tensors), frozenset(trained), level)
        if key not in self._layouts:
            plain = schema_of(self.ranks.cut(tensors, level))
            exact = tuple(n for n in plain if n in buffers)
            groups = self._groups[direction]
            schema: Schema = {**plain, **{f"{g}/{n}": plain[n] for g in groups for n in trained}}
            self._layouts[key] = Layout(
                tuple(n for n in plain if n not in buffers),
                exact,
                groups,
                tuple(trained),
                Format(schema, self._codecs[direction], frozenset(exact)),
            )
        return self._layouts[key]

    def _require_declared(
        self, direction: Direction, extra: Mapping[str, State], trained: State
    ) -> None:
        declared = self._groups[direction]
        if set(extra) != set(declared):
            raise ArgumentsError(
                f"{self._strategy} sends {sorted(extra)} on the {direction}, but declares "
                f"{sorted(declared)}: name what it sends in its class attribute {direction}"
            )
        for group, state in extra.items():
            found, agreed = schema_of(state), schema_of(trained)
            if found != agreed:
                wrong = sorted(
                    n for n in found.keys() | agreed.keys() if found.get(n) != agreed.get(n)
                )
                raise ArgumentsError(
                    f"{self._strategy} sends {group!r} with other tensors than the parameters that "
                    f"train ({len(wrong)} differ, first {wrong[:2]}): each group has their names, "
                    "shapes and dtypes"
                )

    def _feeds_back(self, form: Format) -> bool:
        """Whether a codec may lose something that is to be made up for."""
        return self._feedback and not form.codec.lossless
