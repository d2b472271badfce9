"""The paper's tables and figures: which cells each has, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pictures
from cells import DEFAULT_GAMMA, FAN_IN_HE, FEW_IMAGES, RESULTS, SEEDS, Cell, Results
from report import table

from fedpara_peft.comm.ledger import PAPER_MEGABITS_PER_S, transfer_s

Rows = list[dict[str, Any]]
LABELS = {"dense": "dense", "fedpara": "FedPara", "lowrank": "low-rank", "pfedpara": "pFedPara",
          "fedper": "FedPer", "fedavg": "FedAvg", "local": "local only",
          "fedpara seeded": "FedPara, seeded base",
          "lowrank seeded": "low-rank, seeded base"}  # fmt: skip
STRATEGIES = ("FedAvg", "FedProx", "Scaffold", "FedDyn", "FedAdam")
INITIALIZATIONS = ("", FAN_IN_HE)
VARIANTS = (*INITIALIZATIONS, "tanh", "Jacobian correction, λ = 1",
            "Jacobian correction, λ = 0.1", "one factor block a round")  # fmt: skip
SCENARIOS = (
    ("dirichlet", 1.0, "Dirichlet 0.5, all data"),
    ("dirichlet", 0.2, "Dirichlet 0.5, a fifth of the data"),
    ("classes", 1.0, "at most two classes, all data"),
    ("classes", 0.2, "at most two classes, a fifth of the data"),
)
PERSONAL = ("pfedpara", "fedper", "fedavg", "local")
TARGETS = (0.8, 0.9)
EQUAL_SIZE = ("dense", "fedpara", "lowrank")
METHODS = (*EQUAL_SIZE, "fedpara seeded", "lowrank seeded")


def seeds(cell: Cell) -> list[Cell]:
    """One cell for every seed."""
    return [replace(cell, seed=seed) for seed in SEEDS]


def found(results: Results, cell: Cell, all_seeds: bool = True) -> Rows:
    """What there is of a cell."""
    rows = [results.get(c) for c in (seeds(cell) if all_seeds else [cell])]
    return [row for row in rows if row is not None]


def rate(results: Results, cell: Cell) -> str:
    """The learning rate that a cell was trained with."""
    tuned = results.tuned(cell)
    assert tuned is not None
    return f"{tuned.learning_rate:g}"


def one_seed(results: Results, cells: list[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
    """Cells that were run, each with its result."""
    return [(cell, row) for cell in cells for row in found(results, cell, False)]


def splits(task: str) -> tuple[str, ...]:
    """The divisions of a task's data."""
    return ("iid", "role" if task == "shakespeare" else "dirichlet")


def each(rows: Rows) -> str:
    """The accuracy of every seed."""
    return ", ".join(f"{100 * row['accuracy']:.1f}" for row in rows)


def percent(rows: Rows, name: str = "accuracy") -> str:
    """Mean ± standard deviation, and of how many seeds where some are missing."""
    values = [100 * row[name] for row in rows]
    if not values:
        return "not run"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def equal_size_cells(scale: str, task: str) -> list[Cell]:
    """Table 2: dense, FedPara and low-rank of FedPara's size."""
    kinds = [(split, method, DEFAULT_GAMMA[task])
             for split in splits(task) for method in METHODS]  # fmt: skip
    if DEFAULT_GAMMA[task] and scale == "cpu":
        kinds += [("iid", "fedpara", 0.0), ("iid", "lowrank", 0.0)]
    return [c for split, method, gamma in kinds
            for c in seeds(Cell(task, scale, method, split, gamma))]  # fmt: skip


def equal_size(scale: str, task: str, results: Results) -> str:
    """Accuracy at equal size."""
    lines = []
    cells = [c for c in equal_size_cells(scale, task) if c.seed == SEEDS[0]]
    for cell in cells:
        rows = found(results, cell)
        if not rows:
            continue
        gamma = "" if cell.method == "dense" else f", γ = {cell.gamma:g}"
        lines.append([f"{cell.split}, {LABELS[cell.method]}{gamma}", f"{rows[0]['parameters']:,}",
                      f"{rows[0]['bytes'] / 1e6:,.1f}", percent(rows), str(len(rows)),
                      each(rows), rate(results, cell)])  # fmt: skip
    head = ["split, model", "parameters", "MB sent", "accuracy, %", "seeds", "every seed's", "rate"]
    return table(head, lines)


def rate_kinds(scale: str, task: str) -> list[Cell]:
    """What is tuned for table 2."""
    return [Cell(task, scale, method, gamma=DEFAULT_GAMMA[task]) for method in METHODS]


def rates(scale: str, task: str, results: Results) -> str:
    """Accuracy by learning rate."""
    return tuned_over(results, rate_kinds(scale, task), lambda cell: LABELS[cell.method])


def tuned_over(results: Results, kinds: list[Cell], label: Callable[[Cell], str]) -> str:
    """Accuracy by learning rate, of the runs that tuned the rates; the grids grew as needed."""
    tuned = [(kind, results.tuning(kind)) for kind in kinds]
    runs = {
        label(kind): {cell.learning_rate: found(results, cell, False) for cell in cells}
        for kind, (cells, best) in tuned
        if best is not None
    }
    columns = sorted({rate for of in runs.values() for rate in of})
    lines = [[name, *(percent(of[r]) if r in of else "" for r in columns)]
             for name, of in runs.items()]  # fmt: skip
    text = table(["accuracy, %", *(f"rate {rate:g}" for rate in columns)], lines)
    rounds = kinds[0].of.tuning_rounds
    return f"{text}\n\nThe runs that tuned the rates: {rounds} rounds, IID, one seed."


def few_cells(scale: str, task: str) -> list[Cell]:
    """Table 2 at γ = 0 on so few images that the models come to the end of what they can fit."""
    return [Cell(task, scale, method, gamma=DEFAULT_GAMMA[task] if method == "dense" else 0.0,
                 variant=FEW_IMAGES) for method in EQUAL_SIZE]  # fmt: skip


def few(scale: str, task: str, results: Results) -> str:
    """How well the models fit few images."""
    lines = [
        [LABELS[cell.method], f"{row['parameters']:,}", f"{row['train_loss']:.3f}", percent([row])]
        for cell, row in one_seed(results, few_cells(scale, task))
    ]
    text = table(["model", "parameters", "training loss", "accuracy, %"], lines)
    return (
        f"{text}\n\n{FEW_IMAGES}, two clients, γ = 0, one seed; rates as in table 2. The loss is "
        "that of the last round's local training."
    )


def traffic(scale: str, task: str, results: Results) -> str:
    """Figure 3: accuracy against bytes, and bytes and time to a target."""
    lines, curves = [], []
    for split in splits(task):
        base = Cell(task, scale, "dense", split, DEFAULT_GAMMA[task])
        by_method = {m: found(results, replace(base, method=m)) for m in METHODS}
        for method, rows in by_method.items():
            if rows:
                curves.append((f"{LABELS[method]}, {split}", method, split, mean_curve(rows)))
        for share in TARGETS if by_method["dense"] else ():
            lines += to_target(by_method, share, split, base.of.clients_per_round)
    name = f"{scale}-{task}-figure3.png"
    pictures.accuracy_for_bytes(curves, RESULTS / name, f"{task}, {scale} scale")
    header = ["split, model", "target", "rounds", "MB to it", "times fewer than dense",
              *(f"s at {speed:g} Mbit/s" for speed in PAPER_MEGABITS_PER_S)]  # fmt: skip
    return (
        table(header, lines)
        + f"\n\nTargets: {' and '.join(map(str, TARGETS))} of the dense model's mean accuracy. "
        "Energy is proportional to the bytes, whatever a bit costs. Time: a client's turn as "
        f"measured here, and its transfers, down and up; left out where other work ran beside "
        f"it.\n\n![accuracy against bytes]({name})"
    )


def to_target(by_method: dict[str, Rows], share: float, split: str, clients: int) -> list[Any]:
    """Rounds, bytes and seconds of each method to a share of the dense model's accuracy."""
    target = share_of(by_method["dense"], share)
    lines, reference = [], bytes_to(by_method["dense"], target)
    for method, rows in by_method.items():
        if not rows:
            continue
        start = [f"{split}, {LABELS[method]}", f"{target:.1%}"]
        sent = bytes_to(rows, target)
        if sent is None or reference is None:
            lines.append([*start, "not reached by all", *[""] * (2 + len(PAPER_MEGABITS_PER_S))])
            continue
        per_round = rows[0]["bytes"] / rows[0]["curve"][-1][0]
        turn = turn_s(rows)
        times = [
            "" if turn is None
            else f"{sent / per_round * (turn + transfer_s(per_round / clients, speed)):,.0f}"
            for speed in PAPER_MEGABITS_PER_S
        ]  # fmt: skip
        lines.append([*start, f"{sent / per_round:.0f}", f"{sent / 1e6:,.1f}",
                      f"{reference / sent:.1f}", *times])  # fmt: skip
    return lines


def turn_s(rows: Rows) -> float | None:
    """Seconds of a client's turn; None where other work ran beside it."""
    turns = [row["turn_s"] for row in rows]
    return None if None in turns else statistics.median(turns)


def share_of(rows: Rows, share: float) -> float:
    """A share of the mean accuracy."""
    return share * statistics.mean(row["accuracy"] for row in rows)


def bytes_to(rows: Rows, target: float) -> float | None:
    """Mean bytes to the first evaluation at or above the target; None if not all come to it."""
    reached = [next((p[1] for p in row["curve"] if p[2] >= target), None) for row in rows]
    return statistics.mean(reached) if reached and None not in reached else None


def mean_curve(rows: Rows) -> list[tuple[float, float]]:
    """Megabytes and mean accuracy, by round evaluated in all rows."""
    curves = [{point[0]: point for point in row["curve"]} for row in rows]
    rounds = sorted(set.intersection(*map(set, curves)))
    return [
        (curves[0][r][1] / 1e6, statistics.mean(curve[r][2] for curve in curves)) for r in rounds
    ]


def gamma_cells(scale: str, task: str) -> list[Cell]:
    """Figure 4: one seed for each rank ratio, and dense."""
    ratios = sorted({DEFAULT_GAMMA[task], 0.0, 0.1, 0.3, 0.5, 0.7, 0.9})
    return [Cell(task, scale, "fedpara", gamma=ratio) for ratio in ratios]


def gammas(scale: str, task: str, results: Results) -> str:
    """Accuracy by rank ratio."""
    lines, points = [], []
    dense = found(results, Cell(task, scale, "dense", gamma=DEFAULT_GAMMA[task]), False)
    for cell, row in one_seed(results, gamma_cells(scale, task)):
        lines.append([f"{cell.gamma:g}", f"{row['parameters']:,}",
                      f"{row['bytes'] / 1e6:,.1f}", percent([row])])  # fmt: skip
        points.append((cell.gamma, row["accuracy"]))
    lines += [["dense", f"{r['parameters']:,}", f"{r['bytes'] / 1e6:,.1f}", percent([r])]
              for r in dense]  # fmt: skip
    name = f"{scale}-{task}-figure4.png"
    level = dense[0]["accuracy"] if dense else None
    pictures.accuracy_by_gamma(points, level, RESULTS / name, f"{task}, {scale} scale")
    text = table(["γ", "parameters", "MB sent", "accuracy, %"], lines)
    return f"{text}\n\nOne seed, IID.\n\n![accuracy by rank ratio]({name})"


def strategy_cells(scale: str, task: str) -> list[Cell]:
    """Table 3: FedPara with each strategy."""
    base = Cell(task, scale, "fedpara", gamma=DEFAULT_GAMMA[task])
    return [replace(base, strategy=name) for name in STRATEGIES]


def strategies(scale: str, task: str, results: Results) -> str:
    """Accuracy by strategy."""
    lines = []
    for cell, row in one_seed(results, strategy_cells(scale, task)):
        lines.append([cell.strategy, f"{row['bytes'] / 1e6:,.1f}", percent([row]),
                          rate(results, cell)])  # fmt: skip
    text = table(["strategy", "MB sent", "accuracy, %", "rate"], lines)
    return f"{text}\n\nFedPara, IID, one seed; clients' rate as tuned for FedAvg."


def codec_cells(scale: str, task: str) -> list[Cell]:
    """FedPAQ: quantized uploads with FedPara and dense."""
    base = Cell(task, scale, "fedpara", gamma=DEFAULT_GAMMA[task])
    return [
        replace(base, method=method, codec=codec)
        for method in ("fedpara", "dense")
        for codec in ("identity", "int8", "int4")
    ]


def codecs(scale: str, task: str, results: Results) -> str:
    """Accuracy and bytes by codec."""
    lines = [
        [f"{LABELS[cell.method]}, {cell.codec}", f"{row['bytes'] / 1e6:,.1f}", percent([row])]
        for cell, row in one_seed(results, codec_cells(scale, task))
    ]
    text = table(["model, uplink codec", "MB sent, up and down", "accuracy, %"], lines)
    return f"{text}\n\nIID, one seed; what travels down is not quantized."


def ablation_kinds(scale: str, task: str) -> list[Cell]:
    """FedPara with one thing changed, and low-rank with each initialization."""
    kinds = [("fedpara", v) for v in VARIANTS] + [("lowrank", v) for v in INITIALIZATIONS]
    return [Cell(task, scale, method, gamma=DEFAULT_GAMMA[task], variant=variant)
            for method, variant in kinds]  # fmt: skip


def ablation_cells(scale: str, task: str) -> list[Cell]:
    """Every seed for the initializations, one for the others."""
    return [cell for kind in ablation_kinds(scale, task)
            for cell in (seeds(kind) if kind.variant in INITIALIZATIONS else [kind])]  # fmt: skip


def ablations(scale: str, task: str, results: Results) -> str:
    """Accuracy with one thing changed."""
    lines = []
    for cell in ablation_kinds(scale, task):
        if rows := found(results, cell):
            lines.append([f"{LABELS[cell.method]}, {cell.variant or 'as it is'}",
                          f"{rows[0]['parameters']:,}", f"{rows[0]['bytes'] / 1e6:,.1f}",
                          "" if turn_s(rows) is None else f"{turn_s(rows):.2f}",
                          percent(rows), str(len(rows)), rate(results, cell)])  # fmt: skip
    header = ["model", "parameters", "MB sent", "s a turn", "accuracy, %", "seeds", "rate"]
    return (
        table(header, lines)
        + "\n\nIID; rates as tuned for the models as they are. Codecs: the table above and "
        "[codecs_mnist.md](../codecs_mnist.md); clients trained side by side: "
        "[engines.md](../engines.md)."
    )


def personal_cells(scale: str, task: str) -> list[Cell]:
    """Figure 5: personalization, in the paper's three scenarios and one more."""
    return [
        cell
        for split, share, _ in SCENARIOS
        for method in PERSONAL
        for cell in seeds(Cell(task, scale, method, split, DEFAULT_GAMMA[task], share=share))
    ]


def personal(scale: str, task: str, results: Results) -> str:
    """Each client's own model on its own held-out data."""
    lines, panels = [], []
    for split, share, title in SCENARIOS:
        curves = []
        for method in PERSONAL:
            cell = Cell(task, scale, method, split, DEFAULT_GAMMA[task], share=share)
            rows = found(results, cell)
            if not rows:
                continue
            turns = rows[0]["curve"][-1][0] * cell.of.clients_per_round
            lines.append([f"{title}: {LABELS[method]}", percent(rows),
                          percent(rows, "worst_decile"), f"{rows[0]['bytes'] / turns / 1e3:,.0f}",
                          rate(results, cell)])  # fmt: skip
            numbers = [point[0] for point in rows[0]["curve"]]
            heights = [height for _, height in mean_curve(rows)]
            curves.append((LABELS[method], list(zip(numbers, heights, strict=True))))
        panels.append((title, curves))
    name = f"{scale}-{task}-figure5.png"
    pictures.learning_curves(panels, RESULTS / name)
    header = ["clients' data: method", "accuracy on own data, %", "worst tenth of clients, %",
              "kB a client and round, up and down", "rate"]  # fmt: skip
    return (
        table(header, lines)
        + f"\n\nMean ± standard deviation of {len(SEEDS)} seeds. MNIST stands in for FEMNIST."
        + f"\n\n![learning curves]({name})"
    )
