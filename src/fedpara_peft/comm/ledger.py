"""The ledger: bytes that were sent, counted from the payloads themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from .payload import Payload

Direction = Literal["uplink", "downlink"]


@dataclass(frozen=True)
class Transfer:
    """One payload that was sent."""

    round: int
    client: int
    direction: Direction
    header_bytes: int
    tensor_bytes: int

    @property
    def total_bytes(self) -> int:
        """Length of the payload."""
        return self.header_bytes + self.tensor_bytes


@dataclass
class Ledger:
    """All transfers of a run, in the order they happened."""

    transfers: list[Transfer] = field(default_factory=list)

    def record(self, round: int, client: int, direction: Direction, payload: Payload) -> None:
        """Enter a payload that was sent to or from a client."""
        self.transfers.append(
            Transfer(round, client, direction, payload.header_bytes, payload.tensor_bytes)
        )

    def total_bytes(self, round: int | None = None, direction: Direction | None = None) -> int:
        """Bytes of all payloads, or of one round or direction."""
        return sum(t.total_bytes for t in self._select(round, direction))

    def header_bytes(self, round: int | None = None, direction: Direction | None = None) -> int:
        """The part of :meth:`total_bytes` that is headers."""
        return sum(t.header_bytes for t in self._select(round, direction))

    def _select(self, round: int | None, direction: Direction | None) -> Iterable[Transfer]:
        return (
            t
            for t in self.transfers
            if round in (None, t.round) and direction in (None, t.direction)
        )
