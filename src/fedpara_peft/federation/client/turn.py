"""A client's turn, the same wherever it trains: train, encode, admit, keep."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...comm.errors import PayloadError
from ...comm.payload import Payload, PayloadSize
from ...comm.state import State
from ..arguments import FederatedArguments
from ..server.admission import checked, checked_state
from ..server.channel import Channel
from ..server.privacy import with_own_noise
from ..state import ClientState, ClientUpdate, Outcome, Refused
from ..strategies import Strategy
from .local import Trained


@dataclass(frozen=True)
class Delivery:
    """What became of what a client trained.

    Attributes:
        size: length of what it sent; None if it sent nothing.
        payload: the payload, where one was made.
        update: what the server uses of it; None if it uses nothing.
        state: what the client keeps; None if it keeps what it had.
        refused: why the server uses nothing.
    """

    size: PayloadSize | None = None
    payload: Payload | None = None
    update: ClientUpdate | None = None
    state: ClientState | None = None
    refused: PayloadError | None = None


@dataclass(frozen=True)
class Sealed:
    """An update that only a sum will show.

    Attributes:
        update: what the sum has of it; it stays with the client.
        payload: what travels.
        size: its length.
    """

    update: ClientUpdate
    payload: Payload
    size: PayloadSize


#: Seals a client's update in a round; see ``federation/secure``.
Seal = Callable[[ClientUpdate, int], Sealed]


class Keeps(Protocol):
    """Where what a client keeps is put, a :class:`~..folder.store.ClientStore` often."""

    def put(self, client: int, version: int, state: ClientState) -> None:
        """Keep a client's new state."""


class Held:
    """What clients will keep, until it is known whether they do.

    Attributes:
        states: by client.
    """

    def __init__(self) -> None:
        self.states: dict[int, ClientState] = {}

    def put(self, client: int, version: int, state: ClientState) -> None:
        """Hold a client's new state."""
        self.states[client] = state


class Turns:
    """Takes what clients train through the channel and into the store.

    Args:
        args: the run's settings.
        channel: codecs and lengths.
        strategy: the federated optimizer.
        names: the clients' names.
        seal: what makes an update unreadable to the server; None: it is sent as it is.
    """

    def __init__(
        self,
        args: FederatedArguments,
        channel: Channel,
        strategy: Strategy,
        names: Sequence[Any],
        seal: Seal | None = None,
    ) -> None:
        self._seal = seal
        self._args = args
        self._channel = channel
        self._strategy = strategy
        self._names = names

    def take(
        self,
        client: int,
        round: int,
        train: Callable[[], Trained],
        store: Keeps,
        *,
        encode: bool = False,
        seconds: float = 0.0,
        noise_seed: int | None = None,
    ) -> Outcome:
        """Let a client train and keep what is its own; nothing is kept of what the server refuses.

        Args:
            client: client index.
            round: rounds completed.
            train: what it has to send and may keep.
            store: where what it keeps rests.
            encode: whether the payload is needed, not its length alone.
            seconds: how long it has trained already.
            noise_seed: of noise that the client adds; None: of one that nobody knows.

        Raises:
            Exception: the client's own, with ``on_client_error="raise"``.
        """
        name, start = self._names[client], time.perf_counter()
        sent: ClientUpdate | None = None
        try:
            trained = train()
            seconds += time.perf_counter() - start
            if self._args.noise_mode == "local":
                noisy = with_own_noise(trained.update, self._args, round, noise_seed)
                trained = dataclasses.replace(trained, update=noisy)
            found = deliver(
                trained, self._channel, self._strategy, self._args, encode=encode, seal=self._seal
            )
            sent = None if found.size is None else trained.update
        except PayloadError as error:  # it has nothing to deliver
            found = Delivery(refused=error)
        except Exception as error:
            error.add_note(f"in round {round + 1}, client {name!r}")
            if self._args.on_client_error == "raise":
                raise
            said = str(error).removeprefix(f"client {name!r}: ")
            text = f"it failed: {type(error).__name__}: {said}"
            failed = Refused(client, "failed", text, error)
            return Outcome(client, refused=failed, seconds=seconds)
        payload = found.payload.data if found.payload else b""
        told = found.size is not None
        refused: Refused | None = None
        if found.refused is not None:
            refused = Refused(client, found.refused.reason, str(found.refused))
        elif found.state:
            store.put(client, round + 1, found.state)
        keeps = refused is None and bool(found.state)
        return Outcome(
            client, found.size, None if refused else found.update, refused, keeps, seconds, payload,
            sent, steps=trained.steps.count if told else None,
            terms=trained.terms if told else None,
        )  # fmt: skip


def deliver(
    trained: Trained,
    channel: Channel,
    strategy: Strategy,
    args: FederatedArguments,
    *,
    encode: bool = False,
    seal: Seal | None = None,
) -> Delivery:
    """Send what a client trained, and find what it keeps.

    Client and server must agree about what was sent, so what the strategy keeps is made of what
    arrived: decoded and clipped. A client finds out by doing the same as the server. What the
    server refuses changes nothing of what the client keeps; what is not finite is not even sent.

    Args:
        trained: a client's turn up to here.
        channel: of the run.
        strategy: the federated optimizer.
        args: the run's settings.
        encode: make the payload, also where its length would do.
        seal: what makes it unreadable to the server, once the client itself has checked it.
    """
    turn = trained.turn
    size = channel.uplink_size(trained.update)
    payload = None
    try:
        sent = channel.uplink(trained.update, turn.residual, turn.round, encode=encode)
        payload = sent.payload
        used = checked(sent.received, args, turn.seen.clip_norm)
        if seal is not None:
            sealed = seal(used, turn.round)
            used, payload, size = sealed.update, sealed.payload, sealed.size
        state = checked_state(_kept(trained, used, sent.residual, strategy))
    except PayloadError as error:
        if (
            error.reason == "norm" and seal is None
        ):  # the server finds the same; it is sent to be counted
            return Delivery(size, payload, refused=error)
        return Delivery(refused=error)
    return Delivery(size, payload, used, state)


def _kept(trained: Trained, used: ClientUpdate, residual: State, strategy: Strategy) -> ClientState:
    turn = trained.turn
    kept = strategy.next_kept(turn.seen, trained.active, used.update, used.extra, trained.steps)
    groups = {group: at_rest({**turn.kept.get(group, {}), **s}) for group, s in kept.items()}
    kept_of_optimizer = {
        part: at_rest({**turn.optimizer.get(part, {}), **trained.optimizer.get(part, {})})
        for part in turn.optimizer.keys() | trained.optimizer.keys()
    }
    return ClientState(at_rest(trained.local), groups, residual, kept_of_optimizer)


def at_rest(state: State) -> State:
    """A state in main memory: an accelerator need not hold that of a thousand clients."""
    return {name: tensor.cpu() for name, tensor in state.items()}
