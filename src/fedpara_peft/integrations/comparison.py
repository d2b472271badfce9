"""Several runs on one page: what each reached, for what it sent, and how they differ."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..federation.data.metrics import higher_is_better
from .figures import FigureOf, label_of, legend_above, render, score_names, unit_of
from .page import figure_part, page_of, shown_size, table_of, text_of
from .run_folder import ReportError, Run, load_run

_COLOURS = ("black", "0.45", "0.65")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")
#: Settings that runs of one kind differ in, and that nobody compares.
_BESIDE = {"report_to", "disable_tqdm", "overwrite_output_dir", "client_store", "threads"}


def write_comparison(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    png_folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a page on several runs.

    Args:
        folders: the runs' ``output_dir``.
        output: the page.
        png_folder: where to write the figures as PNG too.

    Returns:
        The page's path.

    Raises:
        ReportError: a folder holds no run, or matplotlib is not installed.
    """
    runs = _named(folders, [load_run(folder) for folder in folders])
    figures = _figures(runs)
    parts = [f"<h1>{len(runs)} federated runs</h1>", _results(runs)]
    parts += [figure_part(figure) for figure in figures]
    parts.append(_differences(runs))
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(", ".join(runs), parts), encoding="utf-8")
    if png_folder is not None:
        Path(png_folder).mkdir(parents=True, exist_ok=True)
        for figure in figures:
            render(figure, Path(png_folder) / f"{figure.name}.png", "png")
    return path


def _named(folders: Sequence[str | os.PathLike[str]], runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by names that tell them apart: the ends of their paths, as long as is needed."""
    paths = [Path(folder).resolve() for folder in folders]
    if twice := [str(path) for path, count in Counter(paths).items() if count > 1]:
        raise ReportError(f"{twice[0]} is given twice: compare runs of different folders")
    parts = 1
    names = [path.name for path in paths]
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return dict(zip(names, runs, strict=True))


def _scores(runs: Mapping[str, Run]) -> list[str]:
    """What any of the runs was evaluated by, the same for all; losses where nothing else is."""
    names = list(dict.fromkeys(name for run in runs.values() for name in score_names(run)))
    losses = [n for n in ("eval_loss", "client_loss_mean") if any(map(_curve_of(n), runs.values()))]
    return (names + losses)[:3]


def _curve_of(name: str) -> Any:
    return lambda run: run.history.curve(name)


def _figures(runs: Mapping[str, Run]) -> list[FigureOf]:
    return [
        FigureOf(
            f"compared_{name}",
            f"{label_of(name).capitalize()}, against rounds and against what was sent",
            lambda figure, name=name: _draw(figure, runs, name),  # type: ignore[misc]
            height=3.2 + 0.2 * (len(runs) // 4),
        )
        for name in _scores(runs)
    ]


def _draw(figure: Any, runs: Mapping[str, Run], name: str) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    unit, size = unit_of(max(run.history.total_bytes for run in runs.values()))
    for i, (label, run) in enumerate(runs.items()):
        if not (curve := run.history.curve(name)):
            continue
        numbers, sent, values = zip(*curve, strict=True)
        style = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _DASHES[i % len(_DASHES)],
            "marker": _MARKERS[i % len(_MARKERS)],
            # Equal curves stay distinguishable: a later one's markers are hollow and larger.
            "markersize": 4 + 1.5 * i,
            "markerfacecolor": "none",
        }
        left.plot(numbers, values, label=label, **style)
        right.plot([s / size for s in sent], values, **style)
    left.set_ylabel(label_of(name))
    left.set_xlabel("round")
    left.set_xlim(left=0)
    left.locator_params(axis="x", integer=True, nbins=7, min_n_ticks=1)
    right.set_xlabel(f"sent so far, up and down [{unit}]")
    right.set_xlim(left=0)
    legend_above(figure, left, columns=4)


def _results(runs: Mapping[str, Run]) -> str:
    names = _scores(runs)
    head = ["run", "rounds", "sent", *(f"{label_of(n)}: last (best)" for n in names), "time"]
    rows = []
    for label, run in runs.items():
        reports = run.history.rounds
        found = [_last_and_best(run, name) for name in names]
        spent = f"{sum(r.seconds for r in reports):,.1f} s"
        rows.append(
            [label, f"{len(reports):,}", shown_size(run.history.total_bytes), *found, spent]
        )
    return f'<div class="wide">\n{table_of(rows, head)}\n</div>'


def _last_and_best(run: Run, name: str) -> str:
    curve = run.history.curve(name)
    if not curve:
        return "–"
    best = max if higher_is_better(name) else min
    number, sent, value = best(curve, key=lambda point: point[2])
    last = f"{curve[-1][2]:.4g}"
    return f"{last} ({value:.4g} after round {number}, {shown_size(sent)})"


def _differences(runs: Mapping[str, Run]) -> str:
    """The settings in which not all runs agree."""
    every = {label: {**run.settings, **run.model} for label, run in runs.items()}
    names = dict.fromkeys(name for settings in every.values() for name in settings)
    rows = []
    for name in names:
        values = [text_of(settings.get(name, "–")) for settings in every.values()]
        if name not in _BESIDE and len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        return '<p class="note">The runs have the same settings.</p>'
    head = ["setting", *runs]
    return f'<h2>Where they differ</h2>\n<div class="wide">\n{table_of(rows, head)}\n</div>'
