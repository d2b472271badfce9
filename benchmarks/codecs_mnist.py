"""Accuracy against megabytes on MNIST for every codec, FedPara and dense.

    python benchmarks/codecs_mnist.py --data FOLDER_OR_HUB_ID

A two-layer perceptron, 20 clients (Dirichlet 0.5) of 200 images on average, 5 a round, 40 rounds of
one epoch, batch 10, tested on 2,000 other images. Each model's learning rate is the best of the
same grid with the identity codec, on a seed that the table does not use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from peft import get_peft_model
from report import RESULTS, table, write
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from personalize_mnist import PersonalArguments, load_images

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig, accuracy, partition

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CODECS = ("identity", "float16", "int8", "int4", "topk:0.1", "topk:0.1+int8")
GRID = (0.1, 0.2, 0.4, 0.8)
SEEDS = (0, 1, 2)
TARGET = 0.85
STYLES = {"dense": ("0.35", "o"), "FedPara": ("tab:blue", "D")}
#: Labels that would meet a neighbour right of the middle of their points.
LEFT = {("FedPara", "int4"), ("FedPara", "int8"), ("FedPara", "float16"), ("dense", "int4")}
BELOW = {("dense", "topk:0.1+int8")}


def build(model: str, seed: int) -> nn.Module:
    """The dense net, or its first layer factorized at γ = 0."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    if model == "dense":
        return net
    config = FedParaConfig(gamma=0.0, base_weight="replaced", target_modules=["0"])
    return get_peft_model(net, config)


def run(
    model: str, codec: str, feedback: bool, rate: float, seed: int, data: TensorDataset
) -> dict[str, Any]:
    """Train once."""
    x, y = data.tensors
    train, test = TensorDataset(x[:4000], y[:4000]), TensorDataset(x[4000:], y[4000:])
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedArguments(
            folder, num_rounds=40, clients_per_round=5, per_client_batch_size=10,
            learning_rate=rate, max_grad_norm=5.0, seed=seed, eval_every=2, disable_tqdm=True,
            uplink_codec=codec, error_feedback=feedback,
        )  # fmt: skip
        clients = partition(train, "dirichlet", 20, seed, concentration=0.5)
        trainer = FederatedTrainer(
            build(model, seed), args, clients, test, compute_metrics=accuracy
        )
        history = trainer.train()
    up = sum(report.uplink_bytes for report in history)
    return {
        "model": model,
        "codec": codec,
        "error_feedback": feedback,
        "seed": seed,
        "learning_rate": rate,
        "accuracy": history[-1].metrics["eval_accuracy"],
        "uplink_megabytes": up / 1e6,
        "total_megabytes": history.total_bytes / 1e6,
        "bytes_to_target": history.bytes_to_target("eval_accuracy", TARGET),
    }


def main() -> None:
    """Tune, measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="ylecun/mnist", help="a Hub data set or a folder")
    parser.add_argument("--plot", action="store_true", help="draw the last results again")
    given = parser.parse_args()
    if given.plot:
        plot(points_of(json.loads((RESULTS / "codecs_mnist.json").read_text())["rows"]))
        return
    where = given.data
    torch.set_num_threads(1)
    data, _ = load_images(PersonalArguments(data=where, num_clients=20, examples_per_client=300))
    rows, lines = [], []
    for model in ("dense", "FedPara"):
        tuned = {rate: run(model, "identity", False, rate, 100, data)["accuracy"] for rate in GRID}
        rate = max(tuned, key=lambda r: tuned[r])
        for codec in CODECS:
            for feedback in (False,) if codec == "identity" else (False, True):
                found = [run(model, codec, feedback, rate, seed, data) for seed in SEEDS]
                rows += found
                values = [100 * row["accuracy"] for row in found]
                reached = [row["bytes_to_target"] for row in found]
                to_target = "not reached by all"
                if all(b is not None for b in reached):
                    to_target = f"{statistics.mean(reached) / 1e6:.2f}"
                name = f"{model}, {codec}" + (", error feedback" if feedback else "")
                up = found[0]["uplink_megabytes"]
                lines.append(
                    [
                        name,
                        f"{up:.2f}",
                        f"{found[0]['total_megabytes']:.2f}",
                        f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}",
                        to_target,
                        f"{rate}",
                    ]
                )
                print(lines[-1], flush=True)
    header = [
        "model, uplink codec", "MB up", "MB up and down", "accuracy, %",
        f"MB to {TARGET:.0%}, up and down", "learning rate",
    ]  # fmt: skip
    text = table(header, lines) + "\n\n![accuracy against megabytes](codecs_mnist.png)"
    write("codecs_mnist", "Codecs on MNIST", text, rows)
    plot(points_of(rows))


def plot(points: list[tuple[str, str, bool, float, float]]) -> None:
    """Accuracy against megabytes sent up; filled with error feedback, joined to without."""
    figure, axes = plt.subplots(figsize=(7.6, 5.0), layout="constrained")
    for model, (color, marker) in STYLES.items():
        for feedback in (False, True):
            chosen = [p for p in points if p[0] == model and p[2] == feedback]
            axes.scatter(
                [p[3] for p in chosen], [p[4] for p in chosen], marker=marker, s=40,
                edgecolors=color, facecolors=color if feedback else "white", zorder=3,
                label=f"{model}, {'with' if feedback else 'without'} error feedback",
            )  # fmt: skip
        for codec in CODECS:
            pair = [p for p in points if p[0] == model and p[1] == codec]
            heights = [p[4] for p in pair]
            axes.plot([pair[0][3]] * len(pair), heights, color=color, linewidth=0.8, zorder=2)
            left, below = (model, codec) in LEFT, (model, codec) in BELOW
            height = min(heights) if below else statistics.mean(heights)
            axes.annotate(
                codec, (pair[0][3], height), textcoords="offset points",
                xytext=(-7 if left else 7, 0), ha="right" if left else "left", va="center",
                fontsize=8, color=color,
            )  # fmt: skip
    axes.margins(x=0.12, y=0.12)
    axes.set(
        xscale="log",
        xlabel="sent by clients, MB (logarithmic)",
        ylabel="test accuracy, % (mean of three seeds)",
        title="MNIST: accuracy and what it costs to send up, by codec",
    )
    axes.set_xticks([2, 5, 10, 20, 50, 100, 200])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(RESULTS / "codecs_mnist.png", dpi=150)
    plt.close(figure)


def points_of(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool, float, float]]:
    """Mean accuracy over seeds and megabytes up, of every model and codec."""
    found: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["codec"], row["error_feedback"]), []).append(row)
    return [
        (*key, group[0]["uplink_megabytes"], statistics.mean(100 * r["accuracy"] for r in group))
        for key, group in found.items()
    ]


if __name__ == "__main__":
    main()
