"""The history of a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...comm.ledger import Ledger, shown_bytes
from ...tuner.summary import html_table
from ..data.metrics import higher_is_better as by_name
from ..state import RoundReport

#: In a notebook.
_SHOWN_ROUNDS = 20


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

    def _repr_html_(self) -> str:
        """The last rounds, and what was sent until then."""
        names = list(dict.fromkeys(name for report in self.rounds for name in report.metrics))
        rows, sent = [], 0
        for r in self.rounds:
            sent += r.uplink_bytes + r.downlink_bytes
            values = (r.train_loss, *(r.metrics.get(name) for name in names))
            shown = ("–" if value is None else f"{value:.4g}" for value in values)
            rows.append((r.round, *shown, shown_bytes(sent)))
        left = len(rows) - _SHOWN_ROUNDS
        note = f"<p>{left:,} earlier rounds are not shown</p>\n" if left > 0 else ""
        return note + html_table(rows[-_SHOWN_ROUNDS:], ("round", "train_loss", *names, "sent"))

    def curve(self, metric: str) -> list[tuple[int, int, float]]:
        """``(round, bytes sent so far, value)`` wherever the metric was evaluated."""
        sent, points = 0, []
        for report in self.rounds:
            sent += report.uplink_bytes + report.downlink_bytes
            if metric in report.metrics:
                points.append((report.round, sent, report.metrics[metric]))
        return points

    def bytes_to_target(
        self, metric: str, target: float, higher_is_better: bool | None = None
    ) -> int | None:
        """Bytes sent until the metric first reached the target.

        Args:
            metric: its name in the reports.
            target: the value to reach.
            higher_is_better: whether it is reached from below; by default as
                :func:`~..data.metrics.higher_is_better` tells from the name: from above for losses,
                perplexities and errors.

        Returns:
            None if it never did.
        """
        return self._at_target(metric, target, higher_is_better)[1]

    def rounds_to_target(
        self, metric: str, target: float, higher_is_better: bool | None = None
    ) -> int | None:
        """Rounds until the metric first reached the target; as :meth:`bytes_to_target`."""
        return self._at_target(metric, target, higher_is_better)[0]

    def clock_to_target(
        self, metric: str, target: float, higher_is_better: bool | None = None
    ) -> float | None:
        """Simulated seconds until the metric first reached the target; as :meth:`bytes_to_target`.

        Returns:
            None if it never did, or if the run had no clients' seconds.
        """
        number = self.rounds_to_target(metric, target, higher_is_better)
        return None if number is None else self.rounds[number - 1].clock_s

    def wall_clock_s(self, ledger: Ledger, megabits_per_s: float) -> float | None:
        """Wall-clock time of all rounds with clients side by side: measured computing, transfers.

        Computing is each round's slowest client on the machine that simulated it; for another
        device, give its time to :meth:`Ledger.round_s`.

        Args:
            ledger: the run's.
            megabits_per_s: every client's bandwidth; the paper takes 2, 10 and 50.

        Returns:
            None if computing was not measured in some round.
        """
        computing = [(r.round, r.slowest_client_s) for r in self.rounds]
        if any(s is None for _, s in computing):
            return None
        return sum(ledger.round_s(n, megabits_per_s, s or 0.0) for n, s in computing)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history as JSON: whole, or not at all."""
        rows = [report_to_json(report) for report in self.rounds]
        write_whole(Path(path), json.dumps(rows, indent=1, allow_nan=False) + "\n")

    def _at_target(
        self, metric: str, target: float, higher: bool | None
    ) -> tuple[int, int] | tuple[None, None]:
        sign = 1 if (by_name(metric) if higher is None else higher) else -1
        points = self.curve(metric)
        reached = ((number, sent) for number, sent, v in points if sign * v >= sign * target)
        return next(reached, (None, None))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what :meth:`save` wrote."""
        rows = json.loads(Path(path).read_text())
        return cls(tuple(map(report_from_json, rows)))


def report_to_json(report: RoundReport) -> dict[str, Any]:
    """A report as a JSON object; NaN and infinity, which JSON has not, as text."""
    row = asdict(report)
    # Pairs and not an object: its keys would become text, and clients' names may be numbers.
    row["client_metrics"] = {n: list(v.items()) for n, v in report.client_metrics.items()}
    return _plain(row)


def report_from_json(row: dict[str, Any]) -> RoundReport:
    """The inverse of :func:`report_to_json`."""
    row = {**row, "cohort": _name(row["cohort"]), "dropped": _name(row["dropped"])}
    row["refused"] = tuple((_name(client), reason) for client, reason in row["refused"])
    row["client_metrics"] = {
        name: {_name(client): _number(value) for client, value in pairs}
        for name, pairs in row["client_metrics"].items()
    }
    row["metrics"] = {name: _number(value) for name, value in row["metrics"].items()}
    return RoundReport(**{name: _number(value) for name, value in row.items()})


def write_whole(path: Path, text: str) -> None:
    """Replace a file by another that is whole from the first moment on."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _name(value: Any) -> Any:
    """A client's name, or several: JSON has lists for tuples."""
    return tuple(map(_name, value)) if isinstance(value, list) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
