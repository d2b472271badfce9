"""A picture of the ways to federate: held-out loss against rounds and against bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

COLORS = {"LoRA": "#2471a3", "FedPara": "#c0392b"}
MARKERS = {"plain": "o", "exact average": "s", "ranks r/2, r, 2r": "D", "int8": "^", "int4": "v",
           "one block": "x", "at LoRA's rate": "P"}  # fmt: skip
#: Of an evaluated round: its number, megabytes sent until then, loss.
Points = list[tuple[float, float, float]]


def loss_for_bytes(curves: Mapping[tuple[str, str], Points], path: Path, title: str) -> None:
    """Loss of every adapter and way, by round and by megabytes."""
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained", sharey=True)
    for (adapter, way), points in curves.items():
        color = COLORS[adapter]
        for x, panel in enumerate(panels):
            panel.plot(
                [point[x] for point in points], [point[2] for point in points], color=color,
                marker=MARKERS[way], markersize=5, linewidth=1.1, alpha=0.9,
                linestyle="-" if way == "plain" else "--",
                markerfacecolor=color if way == "plain" else "white",
                label=adapter + (f", {way}" if way != "plain" else ""),
            )  # fmt: skip
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(xlabel="round", ylabel="held-out loss (mean of the seeds)")
    panels[1].set(xlabel="sent, up and down (MB, logarithmic)", xscale="log")
    for panel in panels:
        panel.grid(alpha=0.25, which="both", linewidth=0.5)
    panels[1].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
