"""The ledger: bytes that were sent, counted from the payloads themselves."""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from .payload import PayloadSize

Direction = Literal["uplink", "downlink"]
_DIRECTIONS: tuple[Direction, ...] = ("uplink", "downlink")
_COLUMNS = 4


#: Bandwidths at which the paper models a round.
PAPER_MEGABITS_PER_S = (2.0, 10.0, 50.0)


def energy_j(num_bytes: float, joules_per_bit: float) -> float:
    """Energy of sending bytes between a user and a data centre.

    There is no default: the figure depends on network and year by orders of magnitude. Give the one
    of a source that you can name.
    """
    return 8 * num_bytes * joules_per_bit


def transfer_s(num_bytes: float, megabits_per_s: float) -> float:
    """Time to send bytes at a bandwidth."""
    return 8 * num_bytes / (1e6 * megabits_per_s)


def shown_bytes(num_bytes: float) -> str:
    """Bytes as a reader takes them in, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def shown_s(seconds: float) -> str:
    """A time as a reader takes it in."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.3g} s"


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
    """All transfers of a run, 32 bytes each."""

    def __init__(self) -> None:
        self._rounds: dict[int, array[int]] = {}

    def record(self, round: int, client: int, direction: Direction, size: PayloadSize) -> None:
        """Enter a payload that was sent to or from a client."""
        row = (client, _DIRECTIONS.index(direction), size.header_bytes, size.tensor_bytes)
        self._rounds.setdefault(round, array("q")).extend(row)

    def transfers(
        self, round: int | None = None, direction: Direction | None = None
    ) -> Iterator[Transfer]:
        """All transfers in the order they happened, or those of one round or direction."""
        for number in self._rounds if round is None else [round]:
            row = iter(self._rounds.get(number, ()))
            for client, way, header, tensors in zip(row, row, row, row, strict=True):
                if direction in (None, _DIRECTIONS[way]):
                    yield Transfer(number, client, _DIRECTIONS[way], header, tensors)

    def total_bytes(self, round: int | None = None, direction: Direction | None = None) -> int:
        """Bytes of all payloads, or of one round or direction."""
        return sum(t.total_bytes for t in self.transfers(round, direction))

    def header_bytes(self, round: int | None = None, direction: Direction | None = None) -> int:
        """The part of :meth:`total_bytes` that is headers."""
        return sum(t.header_bytes for t in self.transfers(round, direction))

    def round_s(self, round: int, megabits_per_s: float, compute_s: float = 0.0) -> float:
        """Wall-clock time of a round in which all clients work side by side.

            computing time + the longest of the clients' transfers, down and up

        Args:
            round: counted from 1.
            megabits_per_s: every client's bandwidth; the paper takes 2, 10 and 50.
            compute_s: computing time of the slowest client; left out by default.
        """
        by_client: dict[int, int] = {}
        for transfer in self.transfers(round):
            sent = by_client.get(transfer.client, 0)
            by_client[transfer.client] = sent + transfer.total_bytes
        return compute_s + transfer_s(max(by_client.values(), default=0), megabits_per_s)

    def energy_j(self, joules_per_bit: float) -> float:
        """Energy of all transfers; see :func:`energy_j`."""
        return energy_j(self.total_bytes(), joules_per_bit)

    def to_json_lines(self, path: str | os.PathLike[str]) -> None:
        """Write all transfers, a JSON object a line."""
        lines = (json.dumps(asdict(transfer)) + "\n" for transfer in self.transfers())
        Path(path).write_text("".join(lines))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all transfers as comma-separated values."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(name.name for name in fields(Transfer))
            writer.writerows(astuple(transfer) for transfer in self.transfers())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all transfers as one array of int64, a row each, the round first."""
        rows = [
            np.insert(np.array(row).reshape(-1, _COLUMNS), 0, number, axis=1)
            for number, row in self._rounds.items()
        ]
        empty = np.empty((0, _COLUMNS + 1), np.int64)
        np.save(path, np.concatenate([empty, *rows]), allow_pickle=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read what :meth:`save` wrote."""
        ledger = cls()
        for number, *row in np.load(path, allow_pickle=False).tolist():
            ledger._rounds.setdefault(number, array("q")).extend(row)
        return ledger
