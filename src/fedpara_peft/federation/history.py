"""The history of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .state import RoundReport


@dataclass(frozen=True)
class History:
    """The reports of all rounds, in order."""

    rounds: tuple[RoundReport, ...] = ()

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[RoundReport]:
        return iter(self.rounds)

    def __getitem__(self, index: int) -> RoundReport:
        return self.rounds[index]

    @property
    def total_bytes(self) -> int:
        """Bytes sent in both directions."""
        return sum(r.uplink_bytes + r.downlink_bytes for r in self.rounds)

    def curve(self, metric: str) -> list[tuple[int, int, float]]:
        """``(round, bytes sent so far, value)`` wherever the metric was evaluated."""
        sent, points = 0, []
        for report in self.rounds:
            sent += report.uplink_bytes + report.downlink_bytes
            if metric in report.metrics:
                points.append((report.round, sent, report.metrics[metric]))
        return points

    def bytes_to_target(self, metric: str, target: float) -> int | None:
        """Bytes sent until the metric first reached the target; None if it never did."""
        return next((sent for _, sent, value in self.curve(metric) if value >= target), None)

    def rounds_to_target(self, metric: str, target: float) -> int | None:
        """Rounds until the metric first reached the target; None if it never did."""
        return next((number for number, _, value in self.curve(metric) if value >= target), None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history as JSON."""
        Path(path).write_text(json.dumps([asdict(r) for r in self.rounds], indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what :meth:`save` wrote."""
        rows = json.loads(Path(path).read_text())
        return cls(tuple(map(report_from_json, rows)))


def report_from_json(row: dict[str, Any]) -> RoundReport:
    """A report from its JSON object."""
    row = {**row, "cohort": tuple(row["cohort"]), "dropped": tuple(row["dropped"])}
    row["refused"] = tuple((client, reason) for client, reason in row["refused"])
    row["client_metrics"] = {n: tuple(v) for n, v in row["client_metrics"].items()}
    return RoundReport(**row)
