"""Read the folder of a run: its history, its settings, what its newest checkpoint adds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..federation.folder.checkpoint import checkpoints
from ..federation.folder.history import History, report_from_json
from ..federation.folder.settings import SETTINGS_NAME
from ..federation.state import RoundReport
from ..maths.errors import FedParaError


class ReportError(FedParaError, ValueError):
    """A folder holds nothing that could be reported on, or an optional extra is missing."""


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    Attributes:
        name: the folder's.
        history: all rounds.
        settings: by name; empty where the folder has none.
        versions: of the packages it ran with.
        source: the file that the rounds were read from.
        model: what was factorized and how, by name; empty where the folder does not say.
        weights: of every trained weight or module name, kind, shape, r, trained entries, entries of
            the plain model and scope; likewise.
    """

    name: str
    history: History
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: str = "history.json"
    model: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[Sequence[Any]] = ()


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run's folder.

    ``history.json`` is written when a run ends; of one that was interrupted, or resumed and
    interrupted again, the newest checkpoint knows more rounds.

    Raises:
        ReportError: there is neither, or a file cannot be read.
    """
    path = Path(folder)
    states = {n: p / "trainer_state.json" for n, p in checkpoints(path).items()}
    state = _json(states[max(states)], dict) if states else None
    source = "history.json"
    rows = _json(path / source, list)
    if state is not None:
        newest = f"checkpoint-{max(states)}/trainer_state.json"
        found = state.get("rounds")
        if not isinstance(found, list):
            raise ReportError(f"{path / newest} names no rounds: remove that checkpoint")
        if rows is None or len(found) > len(rows):
            rows, source = found, newest
    if rows is None:
        raise ReportError(
            f"{folder} holds neither history.json nor a checkpoint: give the output_dir of a run "
            "that ended, or one with save_every"
        )
    try:
        history = History(tuple(_checked(report_from_json(row)) for row in rows))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path / source} is of another version ({error}): report with the version that "
            "wrote it"
        ) from None
    if not len(history):
        raise ReportError(f"{path / source} has no rounds: there is nothing to report on")
    settings = _json(path / SETTINGS_NAME, dict) or (state or {}).get("settings", {})
    try:
        found = settings.get("adapters") or {}
        weights = [_weight(row) for row in found.get("weights", [])]
        facts = {n: v for n, v in found.items() if n != "weights"}
        return Run(path.resolve().name, history, *_split(settings), source, facts, weights)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path} has settings of another version ({error}): report with the version that wrote "
            "them"
        ) from None


def _weight(row: Any) -> tuple[Any, ...]:
    """A weight's row, if its values are of the kinds that it says; else an error."""
    name, kind, shape, r, trained, dense, scope = row
    return str(name), str(kind), tuple(map(int, shape)), r, int(trained), int(dense), str(scope)


def _checked(report: RoundReport) -> RoundReport:
    """The report, if its values are of the kinds that it says; else a TypeError."""
    counts = (report.round, report.uplink_bytes, report.downlink_bytes, report.header_bytes)
    optional = (report.train_loss, report.averaging_bias, report.epsilon, report.slowest_client_s,
                report.clip_norm)  # fmt: skip
    measured = (report.local_steps, report.terms, report.peak_memory_bytes)
    own = [value for values in report.client_metrics.values() for value in values.values()]
    if not all(isinstance(count, int) for count in counts):
        raise TypeError(f"{counts} stand for a round and bytes")
    for client in (*report.cohort, *report.dropped, *(client for client, _ in report.refused)):
        if not isinstance(client, int | str):
            raise TypeError(f"{client!r} stands for a client")
    for value in (report.seconds, *optional, *measured, *report.metrics.values(), *own):
        if not isinstance(value, int | float | None):
            raise TypeError(f"{value!r} stands for a number")
    if report.seconds is None or not all(isinstance(reason, str) for _, reason in report.refused):
        raise TypeError("a round has no time, or a refusal no reason")
    return report


def _split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings on one level, and versions."""
    if isinstance(settings.get("strategy"), list):  # as a checkpoint has them, to compare
        name, own = settings["strategy"]
        shown = ", ".join(f"{n}={v}" for n, v in own.items())
        clients = settings.get("clients", {})
        settings = {
            **settings,
            "strategy": f"{name}({shown})",
            "clients": clients.get("number of clients"),
            "examples": clients.get("number of examples"),
        }
    apart = ("arguments", "versions", "model", "identity", "adapters")
    flat = {n: v for n, v in settings.items() if n not in apart}
    return {**flat, **settings.get("arguments", {})}, dict(settings.get("versions", {}))


def _json(path: Path, kind: type) -> Any:
    """What a file holds, None if there is none."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}): remove it, or run again") from None
    if not isinstance(found, kind):
        raise ReportError(f"{path} holds a {type(found).__name__}: no run wrote it")
    return found
