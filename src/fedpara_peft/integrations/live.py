"""A run while it runs, from its folder alone: so it works beside any engine, on any machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from ..federation.state import RoundReport
from .figures import label_of, score_names
from .page import shown_size
from .run_folder import ReportError, Run, load_run

#: Rounds whose time tells how long the others will take, and rounds shown at first.
_RECENT = 10


def watch(
    folder: str | os.PathLike[str],
    out: TextIO,
    every_s: float = 2.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Tell a run's rounds as they come; ends when all that were asked for are there.

    Args:
        folder: its ``output_dir``; it may begin later.
        out: where to; on a terminal a last line says how the run stands.
        every_s: how often the folder is looked into.
        sleep: waits.

    Raises:
        ReportError: the folder holds something else than a run.
    """
    path, shown, head = Path(folder), 0, ""
    while True:
        run = _found(path)
        if run is not None:
            new = list(_lines(run, shown))
            if new and head != (head := new[0]):
                print(head, file=out)
            for line in new[1:]:
                print(line, file=out)
            shown = run.history[-1].round
        asked = None if run is None else run.settings.get("num_rounds")
        if asked is not None and shown >= asked:
            print(standing(run), file=out, flush=True)
            return
        if out.isatty():
            print(f"\r\033[K{standing(run)}", end="\r", file=out, flush=True)
        out.flush()
        sleep(every_s)


def standing(run: Run | None) -> str:
    """How a run stands, in a line; None: it has no round yet."""
    if run is None:
        return "waiting for the first round"
    reports = run.history.rounds
    asked = run.settings.get("num_rounds")
    parts = [f"round {reports[-1].round:,}" + (f" of {asked:,}" if asked is not None else "")]
    parts.append(f"{shown_size(run.history.total_bytes)} sent")
    lost = sum(len(r.dropped) for r in reports), sum(len(r.refused) for r in reports)
    if any(lost):
        parts.append(f"{lost[0]:,} did not report, {lost[1]:,} refused")
    epsilon = next((r.epsilon for r in reversed(reports) if r.epsilon is not None), None)
    if epsilon is not None:
        parts.append(f"ε = {epsilon:.3g}")
    if asked is not None and asked > reports[-1].round:
        pace = statistics.median(r.seconds for r in reports[-_RECENT:])
        parts.append(f"about {_clock(pace * (asked - reports[-1].round))} left")
    return ", ".join(parts)


def _found(path: Path) -> Run | None:
    """The run so far; None where it has no round yet."""
    has_rounds = (path / "history.json").is_file() or any(path.glob("checkpoint-*"))
    if not has_rounds or _text(path / "history.json").strip() == "[]":
        if path.is_file():
            raise ReportError(f"{path} is a file: give a run's output_dir")
        return None
    return load_run(path)


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _lines(run: Run, shown: int) -> Iterator[str]:
    """A head, and a line for every round that was not shown yet."""
    names = score_names(run)
    if "eval_loss" in {name for report in run.history for name in report.metrics}:
        names.append("eval_loss")
    titles = ["round", "train loss", *map(label_of, names), "up", "down", "lost", "s"]
    widths = [max(10, len(title)) for title in titles]
    yield "  ".join(title.rjust(width) for title, width in zip(titles, widths, strict=True))
    new = [report for report in run.history if report.round > shown]
    for report in new if shown else new[-_RECENT:]:
        cells = _cells(report, names)
        yield "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _cells(report: RoundReport, names: list[str]) -> list[str]:
    values = [report.train_loss, *(report.metrics.get(name) for name in names)]
    return [
        str(report.round),
        *("–" if value is None else f"{value:.4g}" for value in values),
        shown_size(report.uplink_bytes),
        shown_size(report.downlink_bytes),
        str(len(report.dropped) + len(report.refused)),
        f"{report.seconds:.1f}",
    ]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
