"""A run as one self-contained HTML page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..federation.state import RoundReport
from .figures import FigureOf, figures_of, label_of, render, score_names
from .page import figure_part, page_of, shown_size, table_of, text_of
from .run_folder import Run, load_run

_SHOWN_ROUNDS = 1000
_COLUMNS = (
    "r: inner rank of each factor; trained: entries that clients train; dense: entries of the same "
    "part of the plain model; scope: global entries are sent, local ones stay with the client."
)
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
        parts.append(figure_part(figure))
        if figure.name == "lost_clients":
            parts.append(_reasons(run))
    parts.append(_model(run))
    parts.append(_settings(run))
    parts.append(_rounds(run))
    return page_of(run.name, parts)


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
    rows.append(
        ("sent", f"{shown_size(total)}: {shown_size(up)} up, {shown_size(down)} down{share}")
    )
    lost = sum(len(r.dropped) for r in reports), sum(len(r.refused) for r in reports)
    rows.append(("clients' turns lost", f"{lost[0]:,} did not report, {lost[1]:,} were refused"))
    epsilon = next((r.epsilon for r in reversed(reports) if r.epsilon is not None), None)
    if epsilon is not None:
        mode = run.settings.get("dp_mode", "central")
        against = "" if mode == "central" else f" against the server, by {mode} noise"
        rows.append(("privacy spent", f"ε = {epsilon:.3g}{against}"))
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
        rows.append(("peak memory", f"{shown_size(max(peaks))}, of the main process"))
    note = f'<p class="note">Read from {escape(run.source)}.</p>'
    return f"{note}\n{table_of(rows)}"


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
    return table_of(rows, ("refused because", "times", "clients"))


def _model(run: Run) -> str:
    """What was factorized, and how."""
    if not run.model and not run.weights:
        return ""
    parts = ["<h2>Model</h2>", table_of((n, text_of(v)) for n, v in run.model.items())]
    if run.weights:
        head = ["weight", "kind", "shape", "r", "trained", "dense", "share", "scope"]
        rows = []
        for name, kind, shape, r, trained, dense, scope in run.weights:
            size = "×".join(map(str, shape)) or "–"
            share = f"{trained / dense:.1%}" if dense else "–"
            rank = "–" if r is None else r
            rows.append([name, kind, size, rank, f"{trained:,}", f"{dense:,}", share, scope])
        parts.append(
            f"<details><summary>Its {len(rows):,} trained weights and modules</summary>\n"
            f'<p class="note">{_COLUMNS}</p>\n<div class="wide">\n{table_of(rows, head)}\n'
            "</div></details>"
        )
    return "\n".join(parts)


def _settings(run: Run) -> str:
    shown = {n: v for n, v in run.settings.items() if v is not None}
    parts = []
    if shown:
        parts.append(f"<h2>Settings</h2>\n{table_of((n, text_of(v)) for n, v in shown.items())}")
    if run.versions:
        parts.append(f"<h2>Versions</h2>\n{table_of(run.versions.items())}")
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
        f"{table_of(rows, head, numbers_from=0)}\n</div></details>"
    )


def _round(report: RoundReport, scores: Sequence[str]) -> list[str]:
    values = [report.train_loss, *(report.metrics.get(name) for name in scores)]
    return [
        str(report.round),
        str(len(report.cohort)),
        str(len(report.dropped) + len(report.refused)),
        *map(_number, values),
        shown_size(report.uplink_bytes),
        shown_size(report.downlink_bytes),
        f"{report.seconds:.2f}",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _of(count: int, asked: int | None) -> str:
    return f"{count:,}" if asked in (None, count) else f"{count:,} of {asked:,} asked for"


def _listed(clients: Sequence[str | int]) -> str:
    shown = ", ".join(map(str, clients[:20]))
    return f"{shown}, … ({len(clients)})" if len(clients) > 20 else shown
