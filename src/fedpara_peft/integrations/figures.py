"""Figures of a run, legible in black and white: lines differ by dash and marker, not by colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import quantiles
from typing import Any

from .run_folder import ReportError, Run

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "0.4", "linestyle": "--", "marker": "s"},
    {"color": "0.6", "linestyle": ":", "marker": "^"},
)
_RC = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.88",
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "fedpara",  # the same run gives the same file
}


@dataclass(frozen=True)
class FigureOf:
    """A figure that a run has the numbers for.

    Attributes:
        name: for file names.
        title: what it shows.
        draw: draws it on a matplotlib figure.
        height: in inches.
    """

    name: str
    title: str
    draw: Callable[[Any], None]
    height: float = 3.0


def figures_of(run: Run) -> list[FigureOf]:
    """The figures that a run has the numbers for, in reading order."""
    rounds = run.history.rounds
    found = []
    scores = score_names(run)
    if scores:
        title = "Quality against rounds and against what was sent"
        found.append(FigureOf("quality", title, lambda f: _quality(f, run, scores)))
    losses = [n for n in ("eval_loss", "client_loss_mean") if run.history.curve(n)]
    if losses or any(r.train_loss is not None for r in rounds):
        found.append(FigureOf("loss", "Loss", lambda f: _loss(f, run, losses)))
    for name in _client_metrics(run):
        title = f"Clients' own {name}"
        found.append(
            FigureOf(f"clients_{name}", title, lambda f, n=name: _clients(f, run, n))  # type: ignore[misc]
        )
    found.append(FigureOf("bytes", "Bytes a round", lambda f: _bytes(f, run)))
    if any(r.dropped or r.refused for r in rounds):
        title = "Clients that did not report or were refused"
        found.append(FigureOf("lost_clients", title, lambda f: _lost(f, run)))
    if any(r.averaging_bias is not None for r in rounds):
        title = "Error of averaging factors instead of weights"
        found.append(FigureOf("averaging_bias", title, lambda f: _bias(f, run)))
    if any(r.epsilon is not None for r in rounds):
        found.append(FigureOf("epsilon", "Privacy spent", lambda f: _epsilon(f, run)))
    return found


def score_names(run: Run) -> list[str]:
    """What is evaluated besides losses, of the global model and in the mean over clients."""
    names = {name for report in run.history for name in report.metrics}
    shown = [n for n in names if n.startswith("eval_") or n.endswith("_mean")]
    scores = [n for n in shown if "loss" not in n]
    return sorted(scores, key=lambda n: ("accuracy" not in n, n.startswith("client_"), n))[:3]


def render(figure: FigureOf, path_or_file: Any, format: str) -> None:
    """Draw a figure into a file, as ``svg`` or ``png``.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("a report needs matplotlib: pip install 'fedpara-peft[report]'") from None
    # No pyplot: it would choose a back-end and keep figures for the whole process.
    with matplotlib.rc_context(_RC):
        drawn = Figure(figsize=(8.4, figure.height), layout="constrained")
        figure.draw(drawn)
        metadata = {"Date": None} if format == "svg" else None
        drawn.savefig(path_or_file, format=format, dpi=150, metadata=metadata)


def label_of(name: str) -> str:
    """A metric's name as a reader sees it."""
    if name.startswith("eval_"):
        return f"{name.removeprefix('eval_').replace('_', ' ')}, global model"
    if name.startswith("client_") and name.endswith("_mean"):
        middle = name.removeprefix("client_").removesuffix("_mean").replace("_", " ")
        return f"{middle}, mean over clients"
    return name.replace("_", " ")


def _quality(figure: Any, run: Run, names: Sequence[str]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    unit, size = unit_of(run.history.total_bytes)
    for name, style in zip(names, _STYLES, strict=False):
        numbers, sent, values = zip(*run.history.curve(name), strict=True)
        for axes, along in ((left, numbers), (right, [s / size for s in sent])):
            _line(axes, along, values, label_of(name), style, every=1)
    short = {n.removeprefix("eval_").removeprefix("client_").removesuffix("_mean") for n in names}
    left.set_ylabel(short.pop().replace("_", " ") if len(short) == 1 else "value")
    _rounds_axis(left, run)
    right.set_xlabel(f"sent so far, up and down [{unit}]")
    right.set_xlim(left=0)
    legend_above(figure, left)


def _loss(figure: Any, run: Run, names: Sequence[str]) -> None:
    axes = figure.subplots()
    train = [(r.round, r.train_loss) for r in run.history if r.train_loss is not None]
    curves = [("clients' training", train)] if train else []
    for name in names:
        curves.append((label_of(name), [(n, v) for n, _, v in run.history.curve(name)]))
    for (label, points), style in zip(curves, _STYLES, strict=False):
        numbers, values = zip(*points, strict=True)
        # Training is known of every round; an evaluation's dot says when it was made.
        _line(axes, numbers, values, label, style, every=0 if points is train else 1)
    axes.set_ylabel("loss")
    _rounds_axis(axes, run)
    legend_above(figure, axes)


def _clients(figure: Any, run: Run, name: str) -> None:
    """How clients differ: quantiles over the rounds, every client at the end."""
    left, right = figure.subplots(1, 2, sharey=True)
    found = [(r.round, _finite(r.client_metrics.get(name, {}))) for r in run.history]
    numbers = [number for number, values in found if values]
    spreads = [_spread(values) for _, values in found if values]
    left.fill_between(
        numbers, [s[0] for s in spreads], [s[-1] for s in spreads],
        facecolor="0.92", edgecolor="0.6", linewidth=0.6, label="worst to best",
    )  # fmt: skip
    left.fill_between(
        numbers, [s[1] for s in spreads], [s[3] for s in spreads],
        facecolor="0.78", edgecolor="0.4", linewidth=0.6, label="10 % to 90 % of clients",
    )  # fmt: skip
    _line(left, numbers, [s[2] for s in spreads], "median", _STYLES[0])
    _rounds_axis(left, run)
    left.set_ylabel(name.replace("_", " "))
    last = sorted(next(values for _, values in reversed(found) if values))
    right.plot(range(1, len(last) + 1), last, "o", color="black", markersize=3)
    right.axhline(sum(last) / len(last), color="0.4", linestyle="--", label="mean")
    right.set_xlabel(f"clients after round {numbers[-1]}, sorted")
    _whole_numbers(right)
    legend_above(figure, left, right)


def _bytes(figure: Any, run: Run) -> None:
    axes = figure.subplots()
    reports = run.history.rounds
    most = max(max(r.uplink_bytes, r.downlink_bytes) for r in reports)
    unit, size = unit_of(most)
    numbers = [r.round for r in reports]
    down = [r.downlink_bytes / size for r in reports]
    _line(axes, numbers, down, "down, server to clients", {**_STYLES[1], "linewidth": 3.0})
    _line(axes, numbers, [r.uplink_bytes / size for r in reports], "up, clients to server",
          _STYLES[0])  # fmt: skip
    axes.set_ylabel(f"all clients together [{unit}]")
    axes.set_ylim(0, 1.1 * most / size or 1)
    _rounds_axis(axes, run)
    legend_above(figure, axes)


def _lost(figure: Any, run: Run) -> None:
    axes = figure.subplots()
    numbers = [r.round for r in run.history]
    dropped = [len(r.dropped) for r in run.history]
    refused = [len(r.refused) for r in run.history]
    width = 0.8 if len(numbers) < 150 else 1.0
    bars = {"width": width, "edgecolor": "black", "linewidth": 0.6 if width < 1 else 0}
    axes.bar(numbers, dropped, facecolor="0.85", label="did not report", **bars)
    axes.bar(numbers, refused, bottom=dropped, facecolor="0.25", label="refused", **bars)
    axes.set_ylabel("clients")
    _whole_numbers(axes, "y")
    _rounds_axis(axes, run)
    legend_above(figure, axes)


def _bias(figure: Any, run: Run) -> None:
    points = [(r.round, r.averaging_bias) for r in run.history if r.averaging_bias is not None]
    _single(figure, run, points, "relative to the mean update [1]")


def _epsilon(figure: Any, run: Run) -> None:
    points = [(r.round, r.epsilon) for r in run.history if r.epsilon is not None]
    delta = run.settings.get("dp_delta")
    _single(figure, run, points, "ε" if delta is None else f"ε at δ = {delta:g}")


def _single(figure: Any, run: Run, points: Sequence[tuple[int, float]], label: str) -> None:
    axes = figure.subplots()
    numbers, values = zip(*points, strict=True)
    _line(axes, numbers, values, label, _STYLES[0])
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    _rounds_axis(axes, run)


def _line(
    axes: Any, x: Sequence[float], y: Sequence[float], label: str, style: Any, every: int = 0
) -> None:
    """A line with a marker at each ``every``-th point, by default as many as tell lines apart."""
    every = every or max(1, len(x) // 15)
    axes.plot(x, y, label=label, markevery=every, **style)


def legend_above(figure: Any, *axes: Any, columns: int | None = None) -> None:
    """A legend outside the axes, where it hides nothing."""
    pairs = [pair for a in axes for pair in zip(*a.get_legend_handles_labels(), strict=True)]
    handles, labels = zip(*pairs, strict=True)
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(len(labels), columns or len(labels))
    )


def _rounds_axis(axes: Any, run: Run) -> None:
    axes.set_xlabel("round")
    last = run.history[-1].round
    axes.set_xlim(0, last + max(0.5, 0.02 * last))
    _whole_numbers(axes)


def _whole_numbers(axes: Any, which: str = "x") -> None:
    axes.locator_params(axis=which, integer=True, nbins=7, min_n_ticks=1)


def _client_metrics(run: Run) -> list[str]:
    every = (pair for report in run.history for pair in report.client_metrics.items())
    return sorted({name for name, values in every if _finite(values)})


def _finite(values: Mapping[Any, float]) -> list[float]:
    return [value for value in values.values() if isfinite(value)]


def _spread(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Least, 10 %, median, 90 %, greatest."""
    if len(values) == 1:
        return (values[0],) * 5
    tenths = quantiles(values, n=10, method="inclusive")
    return min(values), tenths[0], tenths[4], tenths[8], max(values)


def unit_of(num_bytes: float) -> tuple[str, float]:
    """The unit to show so many bytes in, and its size."""
    return next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= s), ("kB", 1e3))
