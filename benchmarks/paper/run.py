r"""Measure the paper's claims, a training run at a time; an interrupted run goes on.

    python benchmarks/paper/run.py --cifar10 FOLDER --shakespeare FILE --mnist FOLDER
    python benchmarks/paper/run.py --scale full --only table2 --tasks cifar10
    python benchmarks/paper/run.py --show    # train nothing, rewrite tables and pictures

Each training run is a line in results/paper/SCALE-TASK.jsonl. Scale ``cpu`` takes some hours on a
core, ``full`` is the paper's set-up for a GPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cells import SCALES, Results, Scale
from claims import write_results
from tables import TABLES
from train import train

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100",
       "cinic10": "flwrlabs/cinic10", "shakespeare": "flwrlabs/shakespeare",
       "mnist": "ylecun/mnist"}  # fmt: skip


#: What is particular to a task at a scale.
REMARKS = {
    (
        "cpu",
        "cifar10",
    ): "VGG4 has four stages of one convolution each, 16, 32, 64 and 128 channels, "
    "and one dense layer; images are halved to 16x16. The images used here were JPEG-coded.",
    ("cpu", "shakespeare"): "Two recurrent layers of 128, the plays of one text, 40 roles.",
    ("cpu", "mnist"): "MNIST stands in for FEMNIST; an MLP 784-256-10, a fifth of each client's "
    "images held out.",
}


def describe(scale: str, task: str, results: Results) -> str:
    """The runs in words: command, machine, figures of the scale."""
    of = SCALES[scale, task]
    ran = sorted(results.hardware(scale, task))
    lines = [f"`python benchmarks/paper/run.py --scale {scale} --tasks {task}`", "; ".join(ran)]
    return "\n\n".join([*lines, f"{_figures(of)} {REMARKS.get((scale, task), '')}".strip()])


def _figures(of: Scale) -> str:
    parts = [f"{of.num_clients} clients, {of.clients_per_round} a round, {of.num_rounds} rounds",
             f"{of.num_local_epochs} local epochs", f"batch {of.batch_size}"]  # fmt: skip
    if of.skewed_epochs:
        parts[1] += f" ({of.skewed_epochs} if not IID)"
    if of.learning_rate_decay != 1:
        parts.append(f"the rate times {of.learning_rate_decay:g} after each round")
    if of.width != 1:
        parts.append(f"layers narrowed to {of.width:g} of their width")
    if of.examples:
        parts.append(f"at most {of.examples:,} training images (a client, for MNIST)")
    if len(of.grid) > 1:
        grid = ", ".join(f"{rate:g}" for rate in of.grid)
        parts.append(f"rates tuned over {grid} in {of.tuning_rounds} rounds of another seed")
    return "; ".join(parts) + f"; gradients clipped at norm {of.max_grad_norm:g}."


def show(results: Results, scale: str, task: str) -> None:
    """Write what was found about a task."""
    if not (results.folder / f"{scale}-{task}.jsonl").exists():
        return
    text = f"# {task}, {scale} scale\n\n{describe(scale, task, results)}\n"
    for found in TABLES.values():
        if task in found.tasks[scale]:
            text += f"\n## {found.title}\n\n{found.show(scale, task, results)}\n"
    (results.folder / f"{scale}-{task}.md").write_text(text)


def main() -> None:
    """Train what is missing, then show everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=["cpu", "full"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=[*TABLES])
    parser.add_argument("--tasks", nargs="+", choices=HUB, default=[*HUB])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="train nothing")
    for task, default in HUB.items():
        parser.add_argument(f"--{task}", default=default, help="a Hub data set or a path")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = Results()
    for name in () if given.show else given.only:
        for task in TABLES[name].tasks[given.scale]:
            if task in given.tasks:
                how = functools.partial(train, data=getattr(given, task))
                results.train(TABLES[name].cells(given.scale, task), how)
    for scale, task in SCALES:
        show(results, scale, task)
    write_results(results)


if __name__ == "__main__":
    main()
