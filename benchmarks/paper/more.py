"""Tables of what the paper does not have: seeded bases, optimizers, decay, folds, no clipping."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

from cells import DEFAULT_GAMMA, KEPT, UNCLIPPED, Cell, Results
from report import table
from tables import EQUAL_SIZE, LABELS, METHODS, Rows, each, found, percent, rate, seeds, tuned_over

#: Points of accuracy below an earlier evaluation that a run must fall for a collapse.
COLLAPSE = 0.05
UNCLIPPED_SEEDS = range(30)
UNCLIPPED_METHODS = ("fedpara", "dense", "fedpara seeded", "lowrank")
OPTIMIZERS = ("sgd", "adamw", "muon")
SEEDED = ("fedpara seeded", "lowrank seeded")
RESPONSES = ("response 0.3", "", "response 3")
DECAYS = ("", "decay of what trains, λ = 0.001", "decay of the product, λ = 0.001")
FOLDS = ("", "folded every 8 rounds", "folded every 4 rounds")


def _kinds(
    scale: str, task: str, methods: tuple[str, ...], variants: tuple[str, ...]
) -> list[Cell]:
    return [Cell(task, scale, method, gamma=DEFAULT_GAMMA[task], variant=variant)
            for variant in variants for method in methods]  # fmt: skip


def all_seeds(kinds: Callable[[str, str], list[Cell]]) -> Callable[[str, str], list[Cell]]:
    """The kinds' cells, one for every seed."""
    return lambda scale, task: [cell for kind in kinds(scale, task) for cell in seeds(kind)]


def _compared(
    results: Results,
    kinds: list[Cell],
    label: Callable[[Cell], str],
    remark: str,
    tuned: bool = False,
) -> str:
    """A table of kinds, and of their tuning; empty if nothing but table 2's was run."""
    if not any(found(results, k) for k in kinds if k.variant or k.optim != "sgd"):
        return ""
    lines = []
    for kind in kinds:
        if rows := found(results, kind):
            losses = [row["train_loss"] for row in rows if row.get("train_loss") is not None]
            loss = f"{statistics.mean(losses):.3f}" if losses else ""
            lines.append([label(kind), f"{rows[0]['parameters']:,}",
                          f"{rows[0]['bytes'] / 1e6:,.1f}", percent(rows), each(rows), loss,
                          rate(results, kind)])  # fmt: skip
    head = ["model", "parameters", "MB sent", "accuracy, %", "every seed's", "training loss",
            "rate"]  # fmt: skip
    text = f"{table(head, lines)}\n\nIID. {remark}"
    return f"{text}\n\n{tuned_over(results, kinds, label)}" if tuned else text


def optimizer_kinds(scale: str, task: str) -> list[Cell]:
    """Each method with each optimizer, and with AdamW whose state the clients keep."""
    kinds = _kinds(scale, task, METHODS, ("",))
    made = [replace(kind, optim=optim) for optim in OPTIMIZERS for kind in kinds]
    kept = [replace(kind, optim="adamw", variant=KEPT) for kind in kinds
            if kind.method in EQUAL_SIZE]  # fmt: skip
    return made + kept


def _with_optimizer(cell: Cell) -> str:
    kept = f", {cell.variant}" if cell.variant else ""
    return f"{LABELS[cell.method]}, {cell.optim}{kept}"


def optimizers(scale: str, task: str, results: Results) -> str:
    """Accuracy by the clients' optimizer."""
    return _compared(
        results, optimizer_kinds(scale, task), _with_optimizer,
        "Every rate is tuned for its method and optimizer, by the same rule. Muon is for matrices "
        "(factors, recurrent weights): a dense kernel, and a factorized kernel's core, AdamW "
        "trains. Where the state is not kept, a client's moments begin anew in every round.", True,
    )  # fmt: skip


def response_kinds(scale: str, task: str) -> list[Cell]:
    """Seeded bases with another response of the weight to its factors' steps."""
    return _kinds(scale, task, SEEDED, RESPONSES)


def _with_variant(cell: Cell) -> str:
    return f"{LABELS[cell.method]}, {cell.variant or 'as it is'}"


def responses(scale: str, task: str, results: Results) -> str:
    """Accuracy by response."""
    return _compared(results, response_kinds(scale, task), _with_variant,
                     "As it is the response is 1; every rate is tuned.", True)  # fmt: skip


def decay_kinds(scale: str, task: str) -> list[Cell]:
    """Decay of the factors, and of their product; of a dense weight they are the same."""
    return _kinds(scale, task, EQUAL_SIZE, DECAYS[:2]) + _kinds(
        scale, task, ("fedpara", "lowrank"), DECAYS[2:]
    )


def decays(scale: str, task: str, results: Results) -> str:
    """Accuracy by weight decay."""
    return _compared(results, decay_kinds(scale, task), _with_variant,
                     "Rates as tuned without decay; λ is not tuned.")  # fmt: skip


def fold_kinds(scale: str, task: str) -> list[Cell]:
    """Seeded bases that take up the factors' product every few rounds."""
    return _kinds(scale, task, SEEDED, FOLDS)


def folds(scale: str, task: str, results: Results) -> str:
    """Accuracy and bytes by how often the factors are folded into the base."""
    return _compared(
        results, fold_kinds(scale, task), _with_variant,
        "Rates as tuned without folds. Bytes with a client's catching up: the factors of all folds "
        "since it last took part. A prototype of this benchmark (folding.py), no feature.",
    )  # fmt: skip


def unclipped_kinds(scale: str, task: str) -> list[Cell]:
    """One cell for each method."""
    return _kinds(scale, task, UNCLIPPED_METHODS, (UNCLIPPED,))


def unclipped_cells(scale: str, task: str) -> list[Cell]:
    """Thirty runs of each method."""
    return [replace(kind, seed=seed) for kind in unclipped_kinds(scale, task)
            for seed in UNCLIPPED_SEEDS]  # fmt: skip


def unclipped(scale: str, task: str, results: Results) -> str:
    """How many runs collapse without clipping."""
    kinds, lines = unclipped_kinds(scale, task), []
    for kind in kinds:
        rows = unclipped_rows(results, kind)
        if rows:
            fell = sum(collapsed(row) for row in rows)
            accuracies = [row["accuracy"] for row in rows]
            worst, middle = min(accuracies), statistics.median(accuracies)
            stuck = sum(accuracy < middle / 2 for accuracy in accuracies)
            refused = sum(row["refused"] for row in rows)
            lines.append([LABELS[kind.method], f"{rows[0]['parameters']:,}", str(len(rows)),
                          str(fell), str(stuck), str(refused), percent(rows), f"{100 * worst:.1f}",
                          rate(results, kind)])  # fmt: skip
    if not lines:
        return ""
    head = ["model", "parameters", "runs", "collapsed", "below half the median", "updates refused",
            "accuracy, %", "worst run's", "rate"]  # fmt: skip
    tuned = tuned_over(results, kinds, lambda cell: LABELS[cell.method])
    return (
        f"{table(head, lines)}\n\nIID, {kinds[0].of.num_rounds} rounds at a "
        "constant rate, a run for each seed. A run "
        f"collapses that ends, or at some evaluation is, more than {100 * COLLAPSE:.0f} points "
        "below where it was before, or diverges. An update that is not finite is refused.\n\n"
        f"{tuned}"
    )


def unclipped_rows(results: Results, kind: Cell) -> Rows:
    """What there is of a method's unclipped runs."""
    rows = [results.get(replace(kind, seed=seed)) for seed in UNCLIPPED_SEEDS]
    return [row for row in rows if row is not None]


def collapsed(row: dict[str, object]) -> bool:
    """Whether a run fell back, by its evaluations."""
    best = 0.0
    for _, _, accuracy in row["curve"]:  # type: ignore[attr-defined]
        if accuracy < best - COLLAPSE:
            return True
        best = max(best, accuracy)
    return bool(row["diverged"])
