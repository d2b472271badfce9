"""What must earn its place, with and without: special products, cost rule, stacked engine, worker.

    python benchmarks/ablations.py [--parts matmul cost engines flower] [--quick]

Every part measures its two sides in turn, in one process and on one thread, and takes the shortest
run of each. The last part starts a Flower federation of real processes (see flower_speed.py).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onednn
import torch
from measure import paired
from peft import get_peft_model
from report import table, write
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig
from fedpara_peft.maths import halves
from fedpara_peft.maths.apply import form_rank
from fedpara_peft.maths.cost import PASS_COST, low_rank_form_is_cheaper

Row = dict[str, Any]


def shortest(ways: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The shortest run of each way, in milliseconds."""
    return {name: min(times) for name, times in paired(ways, seconds).items()}


# Products in oneDNN.


@contextlib.contextmanager
def products_in_onednn() -> Iterator[None]:
    """Compose by oneDNN's product."""
    ours, halves.matmul = halves.matmul, onednn.matmul
    try:
        yield
    finally:
        halves.matmul = ours


def of_products(seconds: float) -> list[Row]:
    """Where weights are composed: the products by themselves, and steps of whole layers."""
    rows = []
    layers: list[tuple[str, nn.Module, Tensor, int, str]] = []
    for width, r in itertools.product((256, 768, 2048, 4096), (8, 32)):
        x = torch.randn(64, width)
        for base in ("frozen", "replaced"):
            layers.append((f"linear {width}², {base}", nn.Linear(width, width), x, r, base))
    for channels, r in itertools.product((64, 256, 512), (8, 32)):
        x = torch.randn(8, channels, 8, 8)
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        layers.append((f"conv 3x3, {channels} channels, replaced", conv, x, r, "replaced"))
    for name, layer, x, r, base in layers:
        model = adapted(layer, r, base, "compose")
        times = shortest(
            {"plain": step(model, x), "onednn": step(model, x, products_in_onednn)}, seconds
        )
        rows.append({"layer": f"{name}, r = {r}", **times})
    return rows


def adapted(layer: nn.Module, r: int, base: str, path: str) -> nn.Module:
    """A layer with random factors."""
    start = {"init_weights": False} if base == "frozen" else {}
    config = FedParaConfig(r=r, base_weight=base, compute_path=path, target_modules=["0"], **start)
    return get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)


def step(
    model: nn.Module,
    x: Tensor,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Callable[[], None]:
    """Forward and backward within a context."""

    def run() -> None:
        for p in model.parameters():
            p.grad = None
        with around():
            model(x).sum().backward()

    return run


def text_of_products(rows: list[Row]) -> str:
    """A table."""
    lines = [
        [row["layer"], f"{row['plain']:.2f}", f"{row['onednn'] / row['plain']:.2f}"] for row in rows
    ]
    header = ["training step, weight composed", "torch.matmul, ms", "in oneDNN, of this"]
    title = "## Products in oneDNN, which are not used (benchmarks/onednn.py)"
    ratio = mean([row["onednn"] / row["plain"] for row in rows])
    return (
        f"{title}\n\n{table(header, lines)}\n\nGeometric mean: {ratio:.3f}. oneDNN is taken from "
        f"{onednn.LEAST_WORK:,} multiplications on."
    )


# The cost rule.


def choice(
    cell: Row, *, c: int = PASS_COST, rows: bool = True, joins: bool = True, products: bool = True
) -> bool:
    """The rule of maths/cost.py with parts of it left out; all: whether it takes the form."""
    p, d, f, r = cell["positions"], cell["dense"], cell["form"], cell["r"]
    joined = cell["joined"] and joins
    composing = (16 if cell["training"] else 4) * r if products else 0
    if cell["training"]:
        return bool((6 * p + c) * f <= (composing + c) * d + (2 if joined else 6) * p * d)
    few = min(1.0, p / r) if rows else 1.0
    return bool((2 * p + c * few) * f <= (composing + c) * d + (0 if joined else 2) * p * d)


RULES: dict[str, Callable[[Row], bool]] = {
    "the rule": choice,
    "without passes (c = 0)": lambda cell: choice(cell, c=0),
    "without few rows (min(1, P / r) = 1)": lambda cell: choice(cell, rows=False),
    "without joining (as if apart)": lambda cell: choice(cell, joins=False),
    "without composing's products (16 r, 4 r = 0)": lambda cell: choice(cell, products=False),
    "parameters alone: F ≤ D": lambda cell: cell["form"] <= cell["dense"],
    "always the form": lambda cell: True,
    "always compose": lambda cell: False,
}


def of_cost(seconds: float, quick: bool) -> list[Row]:
    """Both ways of every layer, number of tokens and rank."""
    widths = (64, 256) if quick else (64, 256, 768, 2048)
    tokens = (1, 64) if quick else (1, 16, 64, 512)
    rows = []
    for width, count, r, base, training in itertools.product(
        widths, tokens, (4, 16, 32), ("frozen", "replaced"), (True, False)
    ):
        if base == "replaced" and 4 * r >= width:  # more factors than weights: it stays dense
            continue
        layer, x = nn.Linear(width, width), torch.randn(count, width)
        ways = {}
        for path in ("khatri_rao", "compose"):
            model = adapted(layer, r, base, path)
            ways[path] = step(model, x) if training else infer(model, x)
        cell = {
            "width": width,
            "positions": count,
            "r": r,
            "base": base,
            "training": training,
            "joined": base == "frozen",
            "launches": False,  # on a processor
            "dense": width * width,
            "form": 2 * width * form_rank(r, "fedpara"),
            **shortest(ways, seconds),
        }
        keys = ("positions", "dense", "form", "r", "training", "joined", "launches")
        assert choice(cell) == low_rank_form_is_cheaper(**{k: cell[k] for k in keys})
        rows.append(cell)
    return rows


def infer(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def text_of_cost(rows: list[Row]) -> str:
    """What every simpler rule chooses, and what that costs."""

    def time_of(cell: Row, form: bool) -> float:
        return float(cell["khatri_rao" if form else "compose"])

    lines = []
    for name, rule in RULES.items():
        taken = [time_of(cell, rule(cell)) for cell in rows]
        best = [min(time_of(cell, True), time_of(cell, False)) for cell in rows]
        ruled = [time_of(cell, choice(cell)) for cell in rows]
        other = [t / u for t, u, c in zip(taken, ruled, rows, strict=True) if rule(c) != choice(c)]
        lines.append(
            [
                name,
                f"{mean([t / b for t, b in zip(taken, best, strict=True)]):.3f}",
                f"{max(t / b for t, b in zip(taken, best, strict=True)):.1f}",
                f"{len(other) / len(rows):.0%}",
                f"{mean(other):.2f}" if other else "-",
            ]
        )
    header = [
        "rule", "time, of the better way's (geometric mean)", "at worst", "chooses otherwise in",
        "there, time of the rule's choice",
    ]  # fmt: skip
    return f"## The cost rule (maths/cost.py)\n\n{table(header, lines)}\n\n" + (
        f"{len(rows)} cells: square linear layers {sorted({r['width'] for r in rows})} wide, "
        f"{sorted({r['positions'] for r in rows})} tokens, r in {sorted({r['r'] for r in rows})}, "
        "frozen (joined) and replaced, training step and inference."
    )


# Engines.


class Cnn(nn.Module):
    """A small convolutional net of 12 x 12 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.out = nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.out(x.flatten(1))


def small_net(name: str, r: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A net with FedPara in its larger layers, and the shape of its inputs."""
    torch.manual_seed(0)
    if name == "CNN":
        net, shape, targets = Cnn(), (1, 12, 12), ["conv2", "out"]
    else:
        widths = tuple(map(int, name.partition(" ")[2].split("-")))
        layers: list[nn.Module] = []
        for m, n in itertools.pairwise(widths):
            layers += [nn.Linear(m, n), nn.ReLU()]
        net, shape, targets = nn.Sequential(*layers[:-1]), widths[:1], ["0"]
    config = FedParaConfig(r=r, base_weight="replaced", target_modules=targets)
    return get_peft_model(net, config), shape


def of_engines(repeats: int, quick: bool) -> list[Row]:
    """Rounds of both engines in turn."""
    nets = ("MLP 64-32-10",) if quick else ("MLP 64-32-10", "MLP 784-200-10", "CNN")
    rows = []
    for name, cohort, r in itertools.product(nets, (10,) if quick else (10, 30, 100), (2, 4)):
        shape = small_net(name, r)[1]
        torch.manual_seed(0)
        data = [
            TensorDataset(torch.randn(40, *shape), torch.randint(10, (40,))) for _ in range(cohort)
        ]
        seconds: dict[str, list[float]] = {"sequential": [], "batched": []}
        for _, engine in itertools.product(range(repeats), seconds):
            with tempfile.TemporaryDirectory() as folder:
                args = FederatedArguments(
                    folder, num_rounds=4, per_client_batch_size=10, engine=engine, disable_tqdm=True
                )  # fmt: skip
                run = FederatedTrainer(small_net(name, r)[0], args, data)
                seconds[engine] += [report.seconds for report in run.train()][1:]
        with tempfile.TemporaryDirectory() as folder:
            args = FederatedArguments(folder, num_rounds=1, disable_tqdm=True)
            stacked = FederatedTrainer(small_net(name, r)[0], args, data)._simulation.stacked
            automatic = bool(stacked and stacked.wanted(cohort))
        rows.append(
            {
                "net": f"{name}, r = {r}",
                "cohort": cohort,
                "sequential_ms": 1e3 * min(seconds["sequential"]) / cohort,
                "batched_of_sequential": min(seconds["batched"]) / min(seconds["sequential"]),
                "chosen": "batched" if automatic else "sequential",
            }
        )
    return rows


def text_of_engines(rows: list[Row]) -> str:
    """A table."""
    lines = [
        [
            row["net"], str(row["cohort"]), f"{row['sequential_ms']:.2f}",
            f"{row['batched_of_sequential']:.2f}", row["chosen"],
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "net", "clients a round", "sequential, ms a client", "stacked, of sequential",
        "engine='auto' takes",
    ]  # fmt: skip
    chosen = [r["batched_of_sequential"] for r in rows if r["chosen"] == "batched"]
    told = f"Where it is taken: {mean(chosen):.2f}." if chosen else "It is taken nowhere here."
    return f"## The stacked engine (federation/client/stack)\n\n{table(header, lines)}\n\n" + (
        f"Clients of 40 examples, batches of 10. {told}"
    )


# Flower's worker.


def of_flower(rounds: int, repeats: int) -> list[Row]:
    """Rounds on real processes, with and without a worker, in turn."""
    import flower_speed as speed  # starts processes, and needs flwr

    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed.make_transformer(folder / "transformer")
        path = [str(speed.EXAMPLE), str(speed.APP), os.environ.get("PYTHONPATH", "")]
        variables = {
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
            "BENCH_MODEL": str(folder / "transformer"),
        }
        with speed.Federation(folder, **variables) as federation:
            federation.superlink()
            for client in range(speed.work.CLIENTS):
                federation.register(client)
                federation.node(client)
            apps = [name for name, (app, _) in speed.APPS.items() if app == "ours"]
            for _, model, app in itertools.product(range(repeats), speed.work.MODELS, apps):
                found.append(speed.run(federation, app, model, rounds))
                for old in folder.glob(f"{model}-ours-*/"):  # its log stays beside it
                    shutil.rmtree(old)
    return found


def text_of_flower(rows: list[Row]) -> str:
    """A table."""
    lines = []
    for model, app in dict.fromkeys((row["model"], row["app"]) for row in rows):
        same = [row for row in rows if (row["model"], row["app"]) == (model, app)]
        each = [s for row in same for s in row["round_s"]]
        parts = [min(row["message"][part] for row in same) for part in same[0]["message"]]
        start = min(row["start_up_s"] for row in same)
        lines.append([f"{model}: {app}", *(f"{value:.1f}" for value in (start, min(each), *parts))])
    header = [
        "", "start-up, s", "a round, s", "of a message: process start", "imports", "work",
    ]  # fmt: skip
    return "## Flower's worker (integrations/flower/worker.py)\n\n" + table(header, lines)


def mean(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parts = ("matmul", "cost", "engines", "flower")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="small cases, nothing written")
    options = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    quick = options.quick
    measures: dict[str, tuple[Callable[[], list[Row]], Callable[[list[Row]], str]]] = {
        "matmul": (lambda: of_products(0.3 if quick else 1.0), text_of_products),
        "cost": (lambda: of_cost(0.02 if quick else 0.3, quick), text_of_cost),
        "engines": (lambda: of_engines(1 if quick else 5, quick), text_of_engines),
        "flower": (lambda: of_flower(2, 1 if quick else 3), text_of_flower),
    }
    rows, texts = [], []
    for part in options.parts:
        measure, text_of = measures[part]
        found = measure()
        rows += [{"part": part, **row} for row in found]
        texts.append(text_of(found))
        print(texts[-1], flush=True)
    if not quick:
        title = "With and without what must earn its place"
        write("ablations", title, "\n\n".join(texts), rows, "cpu")


if __name__ == "__main__":
    main()
