"""A client's turn, the same wherever it trains: train, encode, admit, keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ..comm.errors import PayloadError
from ..comm.payload import PayloadSize
from .admission import checked
from .arguments import FederatedArguments
from .channel import Channel
from .state import ClientState, ClientUpdate, Outcome, Refused
from .store import ClientStore

Trained = Callable[[], tuple[ClientUpdate, ClientState]]


class Turns:
    """Takes what clients train through the channel and into the store.

    Args:
        args: the run's settings.
        channel: codecs and lengths.
        names: the clients' names.
    """

    def __init__(self, args: FederatedArguments, channel: Channel, names: Sequence[Any]) -> None:
        self._args = args
        self._channel = channel
        self._names = names

    def take(
        self,
        client: int,
        round: int,
        train: Trained,
        store: ClientStore,
        *,
        encode: bool = False,
        seconds: float = 0.0,
    ) -> Outcome:
        """Let a client train and keep what is its own; nothing is kept of what the server refuses.

        Args:
            client: client index.
            round: rounds completed.
            train: what it sends and keeps.
            store: where what it keeps rests.
            encode: whether the payload is needed, not its length alone.
            seconds: how long it has trained already.

        Raises:
            Exception: the client's own, with ``on_client_error="raise"``.
        """
        name, start = self._names[client], time.perf_counter()
        size: PayloadSize | None = None
        sent: ClientUpdate | None = None
        payload = b""
        try:
            update, state = train()
            seconds += time.perf_counter() - start
            size = self._channel.format("uplink", update.update, update.extra).size
            sent, state, data = self._channel.uplink(update, state, round, encode=encode)
            payload = data.data if data else b""
            update = checked(sent, self._args)
        except PayloadError as error:
            refused = Refused(client, error.reason, str(error))
            return Outcome(
                client, size, refused=refused, seconds=seconds, payload=payload, sent=sent
            )
        except Exception as error:
            error.add_note(f"in round {round + 1}, client {name!r}")
            if self._args.on_client_error == "raise":
                raise
            text = f"client {name!r} failed: {type(error).__name__}: {error}"
            refused = Refused(client, "failed", text, error)
            return Outcome(client, refused=refused, seconds=seconds)
        if state:
            store.put(client, round + 1, state)
        return Outcome(
            client, size, update, keeps_state=bool(state), seconds=seconds, payload=payload,
            sent=sent,
        )  # fmt: skip
