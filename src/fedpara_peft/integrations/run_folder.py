"""Read the folder of a run: its history, its settings, what its newest checkpoint adds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..federation.checkpoint import checkpoints
from ..federation.history import History, report_from_json
from ..federation.settings import SETTINGS_NAME
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
    """

    name: str
    history: History
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: str = "history.json"


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run's folder.

    ``history.json`` is written when a run ends; of one that was interrupted, or resumed and
    interrupted again, the newest checkpoint knows more rounds.

    Raises:
        ReportError: there is neither, or a file cannot be read.
    """
    path = Path(folder)
    states = {n: p / "trainer_state.json" for n, p in checkpoints(path).items()}
    state = _json(states[max(states)]) if states else None
    source = "history.json"
    rows = _json(path / source)
    if state is not None and (rows is None or len(state["rounds"]) > len(rows)):
        rows, source = state["rounds"], f"checkpoint-{max(states)}/trainer_state.json"
    if rows is None:
        raise ReportError(
            f"{folder} holds neither history.json nor a checkpoint: give the output_dir of a run "
            "that ended, or one with save_every"
        )
    try:
        history = History(tuple(map(report_from_json, rows)))
    except (KeyError, TypeError) as error:
        raise ReportError(
            f"{path / source} is of another version ({error}): report with the version that "
            "wrote it"
        ) from None
    if not len(history):
        raise ReportError(f"{path / source} has no rounds: there is nothing to report on")
    found = _json(path / SETTINGS_NAME) or (state or {}).get("settings", {})
    return Run(path.resolve().name, history, *_split(found), source)


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
    apart = ("arguments", "versions", "model", "identity")
    flat = {n: v for n, v in settings.items() if n not in apart}
    return {**flat, **settings.get("arguments", {})}, settings.get("versions", {})


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}): remove it, or run again") from None
