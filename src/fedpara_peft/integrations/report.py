"""A run as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..federation.state import RoundReport
from .figures import FigureOf, figures_of, label_of, render, score_names, unit_of
from .run_folder import Run, load_run

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #000; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #bbb; padding: .2rem .9rem .2rem 0; text-align: left;
         vertical-align: top; }
td.n, th.n { text-align: right; } img { width: 100%; height: auto; }
.wide { overflow-x: auto; } p.note { color: #444; margin: .2rem 0; }
@media (max-width: 40rem) { body { margin: 1rem auto; } .figure { overflow-x: auto; }
       .figure img { width: auto; min-width: 40rem; } td, th { overflow-wrap: anywhere; } }
@media screen and (prefers-color-scheme: dark) { body { color: #ddd; background: #000; }
       img { filter: invert(1); } p.note { color: #aaa; } th, td { border-color: #555; } }
@media print { details { display: none; } h2 { break-after: avoid; } }
"""
_SHOWN_ROUNDS = 1000
#: Columns of runs that have a simulated clock, or rounds that do not wait.
_LATE = {"clock_s": "clock, s", "staleness_mean": "staleness", "staleness_max": "at most"}


def write_report(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    png_folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the page of a run.

    Args:
        folder: the run's ``output_dir``.
        output: the page; ``report.html`` in the folder by default.
        png_folder: where to write the figures as PNG too.

    Returns:
        The page's path.

    Raises:
        ReportError: the folder holds no run, or matplotlib is not installed.
    """
    run = load_run(folder)
    figures = figures_of(run)
    page = _page(run, figures)
    path = Path(folder) / "report.html" if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    if png_folder is not None:
        Path(png_folder).mkdir(parents=True, exist_ok=True)
        for figure in figures:
            render(figure, Path(png_folder) / f"{figure.name}.png", "png")
    return path


def _page(run: Run, figures: Sequence[FigureOf]) -> str:
    parts = [f"<h1>Federated run {escape(run.name)}</h1>", _overview(run)]
    for figure in figures:
        image = io.BytesIO()
        render(figure, image, "svg")
        data = base64.b64encode(image.getvalue()).decode()
        title = escape(figure.title)
        parts.append(
            f'<h2>{title}</h2>\n<div class="figure">'
            f'<img alt="{title}" src="data:image/svg+xml;base64,{data}"></div>'
        )
        if figure.name == "lost_clients":
            parts.append(_reasons(run))
    parts.append(_settings(run))
    parts.append(_rounds(run))
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(run.name)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _overview(run: Run) -> str:
    reports = run.history.rounds
    up = sum(r.uplink_bytes for r in reports)
    down = sum(r.downlink_bytes for r in reports)
    headers = sum(r.header_bytes for r in reports)
    rows = [("rounds", _of(len(reports), run.settings.get("num_rounds")))]
    if "clients" in run.settings:
        count = run.settings["clients"]
        rows.append(("clients", f"{count:,}, {len(reports[-1].cohort):,} in the last round"))
    for name in score_names(run):
        number, _, value = run.history.curve(name)[-1]
        best_round, _, best = max(run.history.curve(name), key=lambda p: p[2])
        shown = f"{value:.4g} after round {number}; highest {best:.4g} after round {best_round}"
        rows.append((label_of(name), shown))
    total = up + down
    share = f"; {headers / total:.1%} of it headers" if total else ""
    rows.append(("sent", f"{_size(total)}: {_size(up)} up, {_size(down)} down{share}"))
    lost = sum(len(r.dropped) for r in reports), sum(len(r.refused) for r in reports)
    rows.append(("clients' turns lost", f"{lost[0]:,} did not report, {lost[1]:,} were refused"))
    epsilon = next((r.epsilon for r in reversed(reports) if r.epsilon is not None), None)
    if epsilon is not None:
        rows.append(("privacy spent", f"ε = {epsilon:.3g}"))
    rows.append(("time", f"{sum(r.seconds for r in reports):,.1f} s, evaluation left out"))
    slowest = [r.slowest_client_s for r in reports if r.slowest_client_s is not None]
    if slowest:
        shown = f"{sum(slowest):,.1f} s, the slowest of every round"
        rows.append(("clients' training", shown))
    if reports[-1].clock_s is not None:
        rows.append(("simulated clock", f"{reports[-1].clock_s:,.1f} s"))
    ages = [r.staleness_mean for r in reports if r.staleness_mean is not None]
    if ages:
        most = max(r.staleness_max or 0 for r in reports)
        mean = sum(ages) / len(ages)
        rows.append(("staleness", f"{mean:.2f} server steps in the mean of rounds, at most {most}"))
    terms = [r.terms for r in reports if r.terms is not None]
    if terms and len(terms) == len(reports):
        steps = sum(r.local_steps or 0 for r in reports)
        spent = sum(r.seconds for r in reports)
        speed = f", {sum(terms) / spent:,.0f} a second" if spent else ""
        shown = f"{sum(terms):,.0f} examples, or tokens that count, in {steps:,} local steps{speed}"
        rows.append(("trained on", shown))
    peaks = [r.peak_memory_bytes for r in reports if r.peak_memory_bytes is not None]
    if peaks:
        rows.append(("peak memory", f"{_size(max(peaks))}, of the main process"))
    note = f'<p class="note">Read from {escape(run.source)}.</p>'
    return f"{note}\n{_table(rows)}"


def _reasons(run: Run) -> str:
    refused = [(reason, client) for r in run.history for client, reason in r.refused]
    if not refused:
        return ""
    counts = Counter(reason for reason, _ in refused)
    rows: list[Sequence[Any]] = []
    for reason, count in counts.most_common():
        found = {client for why, client in refused if why == reason}
        clients = sorted(found, key=lambda name: (isinstance(name, str), name))
        rows.append((reason, count, _listed(clients)))
    return _table(rows, ("refused because", "times", "clients"))


def _settings(run: Run) -> str:
    shown = {n: v for n, v in run.settings.items() if v is not None}
    parts = []
    if shown:
        parts.append(f"<h2>Settings</h2>\n{_table((n, _text(v)) for n, v in shown.items())}")
    if run.versions:
        parts.append(f"<h2>Versions</h2>\n{_table(run.versions.items())}")
    return "\n".join(parts)


def _rounds(run: Run) -> str:
    """All numbers, for those who want more than figures."""
    scores = score_names(run)
    head = ["round", "cohort", "lost", "training loss", *map(label_of, scores), "up", "down", "s"]
    late = [name for name in _LATE if any(getattr(r, name) is not None for r in run.history)]
    head += [_LATE[name] for name in late]
    rows = [
        [*_round(report, scores), *(_number(getattr(report, name)) for name in late)]
        for report in run.history.rounds[-_SHOWN_ROUNDS:]
    ]
    return (
        '<details><summary>All rounds</summary>\n<div class="wide">\n'
        f"{_table(rows, head, numbers_from=0)}\n</div></details>"
    )


def _round(report: RoundReport, scores: Sequence[str]) -> list[str]:
    values = [report.train_loss, *(report.metrics.get(name) for name in scores)]
    return [
        str(report.round),
        str(len(report.cohort)),
        str(len(report.dropped) + len(report.refused)),
        *map(_number, values),
        _size(report.uplink_bytes),
        _size(report.downlink_bytes),
        f"{report.seconds:.2f}",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(
    rows: Iterable[Sequence[Any]], head: Sequence[str] = (), numbers_from: int | None = None
) -> str:
    def cells(row: Sequence[Any], tag: str) -> str:
        classes = [' class="n"' if numbers_from is not None else "" for _ in row]
        made = (f"<{tag}{c}>{escape(str(v))}</{tag}>" for v, c in zip(row, classes, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    lines = [cells(head, "th")] if head else []
    lines += [cells(row, "td") for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _of(count: int, asked: int | None) -> str:
    return f"{count:,}" if asked in (None, count) else f"{count:,} of {asked:,} asked for"


def _size(num_bytes: float) -> str:
    unit, size = unit_of(num_bytes)
    return f"{num_bytes / size:,.2f} {unit}"


def _listed(clients: Sequence[str | int]) -> str:
    shown = ", ".join(map(str, clients[:20]))
    return f"{shown}, … ({len(clients)})" if len(clients) > 20 else shown


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
