"""Pictures of the tables; stroke and marker tell lines apart in black and white too."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

STROKES = {"dense": ("#444444", "-"), "fedpara": ("#c0392b", "--"), "lowrank": ("#2471a3", ":"),
           "fedpara seeded": ("#d68910", "-."),
           "lowrank seeded": ("#1e8449", (0, (3, 1, 1, 1, 1, 1)))}  # fmt: skip
MARKERS = {"iid": "o"}
METHODS = {"pFedPara": ("#c0392b", "o", "-"), "FedPer": ("#2471a3", "s", "--"),
           "FedAvg": ("#444444", "^", "-."), "local only": ("#1e8449", "x", ":")}  # fmt: skip
Points = list[tuple[float, float]]


def accuracy_for_bytes(curves: list[tuple[str, str, str, Points]], path: Path, title: str) -> None:
    """Accuracy against megabytes; a curve has a label, its method, its split and its points."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for label, method, split, points in curves:
        color, stroke = STROKES[method]
        axes.plot(
            [x for x, _ in points], [100 * y for _, y in points], linestyle=stroke, color=color,
            label=label, marker=MARKERS.get(split, "^"), markersize=4,
            markerfacecolor=color if split == "iid" else "white", linewidth=1.3,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="sent, up and down (MB, logarithmic)",
             ylabel="test accuracy (%)", title=title)  # fmt: skip
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    if curves:
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def accuracy_by_gamma(points: Points, dense: float | None, path: Path, title: str) -> None:
    """Accuracy against the rank ratio, the dense model's as a level."""
    figure, axes = plt.subplots(figsize=(5.6, 4.0), layout="constrained")
    axes.plot([x for x, _ in points], [100 * y for _, y in points], "o-", color="#c0392b",
              label="FedPara")  # fmt: skip
    if dense is not None:
        axes.axhline(100 * dense, color="#444444", linestyle="--", label="dense")
    axes.set(xlabel="rank ratio γ", ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def learning_curves(panels: list[tuple[str, list[tuple[str, Points]]]], path: Path) -> None:
    """Accuracy against rounds, a panel for each scenario."""
    figure, axes = plt.subplots(
        2, 2, figsize=(9.0, 6.6), layout="constrained", sharey=True, sharex=True
    )
    for (title, curves), panel in zip(panels, axes.flat, strict=True):
        for label, points in curves:
            color, marker, stroke = METHODS[label]
            panel.plot([x for x, _ in points], [100 * y for _, y in points], stroke, color=color,
                       marker=marker, markersize=4, linewidth=1.2, label=label)  # fmt: skip
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25, linewidth=0.5)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.supxlabel("round", fontsize=10)
    figure.supylabel("accuracy on clients' own held-out data (%)", fontsize=10)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
