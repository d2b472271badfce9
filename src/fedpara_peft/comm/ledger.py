"""The ledger: bytes that were sent, counted from the payloads themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .payload import Payload

Direction = Literal["uplink", "downlink"]


@dataclass(frozen=True)
class Transfer:
    """One payload that was sent in a round (counted from 1) to or from a client."""

    round: int
    client: int
    direction: Direction
    header_bytes: int
    tensor_bytes: int

    @property
    def total_bytes(self) -> int:
        """Length of the payload."""
        return self.header_bytes + self.tensor_bytes


class Ledger:
    """All transfers of a run."""

    def __init__(self) -> None:
        self._rounds: defaultdict[int, list[Transfer]] = defaultdict(list)

    def record(self, round: int, client: int, direction: Direction, payload: Payload) -> None:
        """Enter a payload that was sent to or from a client."""
        self._rounds[round].append(
            Transfer(round, client, direction, payload.header_bytes, payload.tensor_bytes)
        )

    def transfers(
        self, round: int | None = None, direction: Direction | None = None
    ) -> Iterator[Transfer]:
        """All transfers in the order they happened, or those of one round or direction."""
        rounds = self._rounds.values() if round is None else [self._rounds.get(round, [])]
        return (t for entries in rounds for t in entries if direction in (None, t.direction))

    def total_bytes(self, round: int | None = None, direction: Direction | None = None) -> int:
        """Bytes of all payloads, or of one round or direction."""
        return sum(t.total_bytes for t in self.transfers(round, direction))

    def header_bytes(self, round: int | None = None, direction: Direction | None = None) -> int:
        """The part of :meth:`total_bytes` that is headers."""
        return sum(t.header_bytes for t in self.transfers(round, direction))
