"""Train a federated dense, low-rank and FedPara model on real digits and compare bytes sent.

    python examples/digits_demo.py --output_dir outputs/digits

Writes the FedPara adapter, its logits on the test set, the histories, a table and a picture.
``examples/digits_reload.py`` then loads the adapter in a fresh process and merges it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from digits import METHODS, build_model, load_data
from safetensors.torch import save_file
from transformers import HfArgumentParser

from fedpara_peft import FederatedArguments, FederatedTrainer, History, accuracy, partition

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LABELS = {"dense": "dense", "lowrank": "low-rank", "fedpara": "FedPara"}
STYLES = {
    "dense": ("0.45", ":", "o"),
    "lowrank": ("tab:orange", "--", "s"),
    "fedpara": ("tab:blue", "-", "D"),
}


@dataclass
class DemoArguments:
    """What the demo trains."""

    gamma: float = field(default=0.0, metadata={"help": "FedPara's rank ratio."})
    num_clients: int = field(default=20, metadata={"help": "Clients."})
    concentration: float = field(default=0.5, metadata={"help": "Dirichlet's; small is skewed."})
    target: float = field(default=0.9, metadata={"help": "Accuracy to count the bytes to."})


def main() -> None:
    """Run the demo."""
    demo, args = HfArgumentParser((DemoArguments, FederatedArguments)).parse_args_into_dataclasses()
    train, test = load_data()
    clients = partition(
        train, "dirichlet", demo.num_clients, args.seed, concentration=demo.concentration
    )
    output = Path(args.output_dir)
    histories, parameters = {}, {}
    for method in METHODS:
        print(f"\n{LABELS[method]}")
        model = build_model(method, demo.gamma, args.seed)
        parameters[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        args.output_dir = str(output / method)
        trainer = FederatedTrainer(model, args, clients, test, compute_metrics=accuracy)
        histories[method] = trainer.train()
        if method == "fedpara":
            trainer.save_model(str(output / "adapter"))
            with torch.no_grad():
                logits = model.eval()(test.tensors[0])
            save_file({"logits": logits}, output / "logits.safetensors")
    table = format_table(histories, parameters, demo.target)
    print(f"\n{table}\n")
    (output / "table.md").write_text(table + "\n")
    plot(histories, demo.target, output / "accuracy_vs_megabytes.png")
    print(f"adapter: {output / 'adapter'}\npicture: {output / 'accuracy_vs_megabytes.png'}")


def format_table(histories: dict[str, History], parameters: dict[str, int], target: float) -> str:
    """One row a method."""
    rows = [
        f"| model | parameters | sent, MB | test accuracy | MB to {target:.0%} | of dense |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    dense = histories["dense"].bytes_to_target("eval_accuracy", target)
    for method, history in histories.items():
        reached = history.bytes_to_target("eval_accuracy", target)
        to_target = "not reached" if reached is None else f"{reached / 1e6:.2f}"
        ratio = "-" if reached is None or dense is None else f"{reached / dense:.2f}"
        final = history.curve("eval_accuracy")[-1][2]
        rows.append(
            f"| {LABELS[method]} | {parameters[method]:,} | {history.total_bytes / 1e6:.2f} | "
            f"{final:.1%} | {to_target} | {ratio} |"
        )
    return "\n".join(rows)


def plot(histories: dict[str, History], target: float, path: Path) -> None:
    """Accuracy against megabytes sent, up and down, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method, history in histories.items():
        points = history.curve("eval_accuracy")
        color, line, marker = STYLES[method]
        axes.plot(
            [sent / 1e6 for _, sent, _ in points],
            [100 * value for _, _, value in points],
            color=color, linestyle=line, marker=marker, markersize=3.5, label=LABELS[method],
        )  # fmt: skip
    axes.axhline(100 * target, color="0.8", linewidth=0.8, zorder=0)
    axes.set(
        xscale="log",
        xlabel="sent in both directions (MB, logarithmic)",
        ylabel="test accuracy of the global model (%)",
        title="Federated digits: accuracy for bytes sent",
    )
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
