"""What must earn its place, with and without: special products, cost rule, engines, worker.

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
from fedpara_peft.maths.cost import PROCESSOR, operations
from fedpara_peft.tuner.kinds.product import ProductLayer

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


#: What the rule looks at.
KNOWN = ("positions", "dense", "form", "features", "r", "training", "joined")


def choice(
    cell: Row,
    *,
    rows: bool = True,
    joins: bool = True,
    products: bool = True,
    **changed: int,
) -> bool:
    """The rule of maths/cost.py with parts of it left out; all: whether it takes the form."""
    costs = PROCESSOR._replace(**changed)
    known = {name: cell[name] for name in KNOWN}
    form, compose = operations(**{**known, "joined": cell["joined"] and joins}, costs=costs)
    p, r, training = cell["positions"], cell["r"], cell["training"]
    if not rows and not training:
        form += 2 * costs.weight_pass * (1 - min(1.0, p / r)) * cell["form"]
    if not products:
        compose -= (12 if training else 4) * r * cell["dense"]
    return form <= compose


RULES: dict[str, Callable[[Row], bool]] = {
    "the rule": choice,
    "without passes (c = 0)": lambda cell: choice(cell, weight_pass=0, large_weight_pass=0),
    "large weights as others (C = c)": lambda cell: choice(
        cell, large_weight_pass=PROCESSOR.weight_pass
    ),
    "without passes over activations (a = 0)": lambda cell: choice(cell, activation_pass=0),
    "without launches (l = 0)": lambda cell: choice(cell, launches=0),
    "without few rows (min(1, P / r) = 1)": lambda cell: choice(cell, rows=False),
    "without joining (as if apart)": lambda cell: choice(cell, joins=False),
    "without composing's products (12 r, 4 r = 0)": lambda cell: choice(cell, products=False),
    "parameters alone: F ≤ D": lambda cell: cell["form"] <= cell["dense"],
    "always the form": lambda cell: True,
    "always compose": lambda cell: False,
}
WIDTHS, TOKENS, RANKS = (64, 256, 768, 2048, 4096), (1, 16, 64, 512), (4, 16, 32)
#: Channels, pixels a side, kernel.
KERNELS = ((8, 8, 3), (32, 8, 3), (64, 8, 3), (128, 4, 3), (256, 4, 3), (512, 2, 3), (64, 8, 1),
           (256, 4, 1))  # fmt: skip
BATCHES, KERNEL_RANKS = (4, 32), (2, 4, 8, 16)


def of_cost(seconds: float, quick: bool) -> list[Row]:
    """Both ways of every layer, number of tokens or batch, and rank."""
    cases: list[tuple[str, nn.Module, Tensor, int]] = []
    for width, count, r in itertools.product(
        WIDTHS[:2] if quick else WIDTHS, TOKENS[::2] if quick else TOKENS, RANKS
    ):
        cases.append(("linear", nn.Linear(width, width), torch.randn(count, width), r))
    for (channels, pixels, kernel), batch, r in itertools.product(
        KERNELS[:2] if quick else KERNELS, BATCHES, KERNEL_RANKS
    ):
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        cases.append(("conv", conv, torch.randn(batch, channels, pixels, pixels), r))
    rows = []
    for (kind, layer, x, r), base, training in itertools.product(
        cases, ("frozen", "replaced"), (True, False)
    ):
        width = x.shape[1]
        if base == "replaced" and 4 * r >= width:  # more factors than weights: it stays dense
            continue
        ways = {}
        for path in ("khatri_rao", "compose"):
            model = adapted(layer, r, base, path)
            ways[path] = step(model, x) if training else infer(model, x)
        own = next(each for each in model.modules() if isinstance(each, ProductLayer))
        plan = own.specs["default"].plans["weight"]
        cell = {
            "positions": own._positions(x),
            "dense": plan.shape.numel,
            "form": plan.form_parameters,
            "features": 2 * width,
            "r": r,
            "training": training,
            "joined": base == "frozen",
        }
        size = {"kind": kind, "width": width, "kernel": list(plan.shape.kernel)}
        rows.append({**cell, **size, "base": base, **shortest(ways, seconds)})
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

    def judged(kind: str, name: str, rule: Callable[[Row], bool]) -> list[str]:
        cells = [cell for cell in rows if cell["kind"] == kind]
        lost = [
            time_of(cell, rule(cell)) / min(time_of(cell, True), time_of(cell, False))
            for cell in cells
        ]
        other = [
            time_of(cell, rule(cell)) / time_of(cell, choice(cell))
            for cell in cells
            if rule(cell) != choice(cell)
        ]
        return [
            kind, name, f"{mean(lost):.3f}", f"{max(lost):.1f}",
            f"{sum(x <= 1.03 for x in lost) / len(cells):.0%}",
            f"{len(other) / len(cells):.0%}", f"{mean(other):.2f}" if other else "-",
        ]  # fmt: skip

    header = [
        "layers", "rule", "time, of the better way's (geometric mean)", "at worst", "within 3%",
        "chooses otherwise in", "there, time of the rule's choice",
    ]  # fmt: skip
    kinds = [kind for kind in ("linear", "conv") if any(row["kind"] == kind for row in rows)]
    lines = [judged(kind, name, rule) for kind in kinds for name, rule in RULES.items()]
    counts = " and ".join(f"{sum(r['kind'] == kind for r in rows)} {kind}" for kind in kinds)
    return f"## The cost rule (maths/cost.py)\n\n{table(header, lines)}\n\n" + (
        f"{counts} cells: square linear layers {list(WIDTHS)} wide, {list(TOKENS)} tokens, r in "
        f"{list(RANKS)}; convolutions of {len(KERNELS)} sizes from 8 to 512 channels, batches of "
        f"{list(BATCHES)}, r in {list(KERNEL_RANKS)}; frozen (joined) and replaced, training step "
        "and inference. The rule's constants were fitted to a run of this."
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
    return f"## Clients side by side (federation/client/stack/)\n\n{table(header, lines)}\n\n" + (
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
