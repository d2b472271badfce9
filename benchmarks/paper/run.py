r"""Measure the paper's claims, a training run at a time; an interrupted run goes on.

    python benchmarks/paper/run.py --cifar10 FOLDER --shakespeare FILE --mnist FOLDER
    python benchmarks/paper/run.py --scale wide --jobs 10 --minutes 8 --out FOLDER
    python benchmarks/paper/run.py --scale full --only table2 --tasks cifar10
    python benchmarks/paper/run.py --show    # train nothing, rewrite tables and pictures

Each training run is a line in results/paper/SCALE-TASK.jsonl, or in a file of that name in --out.
Scale ``cpu`` takes some hours on a core, ``wide`` (nets of the paper's width, fewer rounds) half an
hour on a GPU that ten processes share, ``full`` is the paper's set-up for a GPU.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import claims
import inputs
from cells import RESULTS, SCALES, Cell, Results, Scale
from folding import work
from pool import add_options, given_limits, train_all
from registry import TABLES
from train import NETS, data_of

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100",
       "cinic10": "flwrlabs/cinic10", "shakespeare": "flwrlabs/shakespeare",
       "mnist": "ylecun/mnist"}  # fmt: skip
TASKS = list(dict.fromkeys(task for _, task in SCALES))

VGG4 = (
    "VGG4 has four stages of one convolution each, {channels} channels, and one dense layer; "
    "images are halved to 16x16. The images used here were JPEG-coded."
)
#: What is particular to a task at a scale.
REMARKS = {
    ("cpu", "cifar10"): VGG4.format(channels="16, 32, 64 and 128"),
    ("cpu", "shakespeare"): "Two recurrent layers of 128, the plays of one text, 40 roles.",
    ("cpu", "mnist"): "MNIST stands in for FEMNIST; an MLP 784-256-10, a fifth of each client's "
    "images held out.",
    ("wide", "cifar10"): VGG4.format(channels="64, 128, 256 and 512"),
    ("wide", "cifar10-vgg16"): "The paper's net and shares. The images used here were JPEG-coded.",
    ("wide", "shakespeare"): "The paper's net, two recurrent layers of 256; the plays of one text, "
    "40 roles.",
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
        if of.grows:
            parts[-1] += ", and on beyond an end where the best lies"
    return "; ".join(parts) + f"; gradients clipped at norm {of.max_grad_norm:g}."


def show(results: Results, scale: str, task: str) -> None:
    """Write what was found about a task."""
    if not results.hardware(scale, task):
        return
    text = f"# {task}, {scale} scale\n\n{describe(scale, task, results)}\n"
    for found in TABLES.values():
        if task in found.tasks.get(scale, ()) and (shown := found.show(scale, task, results)):
            text += f"\n## {found.title}\n\n{shown}\n"
    (RESULTS / f"{scale}-{task}.md").write_text(text)


def wanted(scale: str, only: list[str], tasks: list[str]) -> list[Cell]:
    """The cells of tables, each once, in the tables' order."""
    cells = [
        cell
        for name in only
        for task in TABLES[name].tasks.get(scale, ())
        if task in tasks
        for cell in TABLES[name].cells(scale, task)
    ]
    return list({cell.key(): cell for cell in cells}.values())


def prepare(cells: list[Cell], data: dict[str, str]) -> None:
    """Decode images before several processes would."""
    for cell in cells:
        if data_of(cell.task) not in ("shakespeare", "mnist"):
            inputs.images(data[data_of(cell.task)], cell.of.examples, NETS[cell.of.net][2])


def main() -> None:
    """Train what is missing, then show everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=["cpu", "wide", "full"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=[*TABLES])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add_options(parser, RESULTS)
    parser.add_argument("--busy", action="store_true", help="times mean nothing: leave them out")
    parser.add_argument("--show", action="store_true", help="train nothing")
    for task, default in HUB.items():
        parser.add_argument(f"--{task}", default=default, help="a Hub data set or a path")
    given = parser.parse_args()
    limits = given_limits(given)
    results = Results(RESULTS, given.out)
    failed: list[str] = []
    if not given.show:
        data = {task: getattr(given, task) for task in HUB}
        cells = wanted(given.scale, given.only, given.tasks)
        prepare(cells, data)
        how = functools.partial(work, data=data, alone=limits.jobs == 1 and not given.busy)
        failed = train_all(cells, results, how, limits, given.out / "checkpoints")
    if given.show or given.out == RESULTS:
        for scale, task in SCALES:
            show(results, scale, task)
        claims.write_results(results)
    if failed:
        sys.exit(f"{len(failed)} cells failed: {os.linesep.join(failed)}")


if __name__ == "__main__":
    main()
