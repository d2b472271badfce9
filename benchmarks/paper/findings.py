"""What the runs say of each claim of the paper; see :mod:`claims`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from cells import DEFAULT_GAMMA, RESULTS, Cell, Results
from more import collapsed, unclipped_kinds, unclipped_rows
from tables import LABELS, SCENARIOS, STRATEGIES, TARGETS, Rows, bytes_to, found, share_of

#: What was found, and whether it is what the paper says; None where it has not been run.
Finding = tuple[str, str] | None
Measure = Callable[[str, Results], Finding]


def ahead(ours: Rows, others: Rows) -> Finding:
    """Whether one method is more accurate than another, seed by seed."""
    if not ours or len(ours) != len(others):
        return None
    means = [100 * statistics.mean(r["accuracy"] for r in rows) for rows in (others, ours)]
    gaps = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(ours, others, strict=True)]
    seeds = ", ".join(f"{gap:+.1f}" for gap in gaps)
    return f"{means[0]:.1f} → {means[1]:.1f} (seeds {seeds})", _sign(gaps)


def _sign(gaps: list[float]) -> str:
    if all(gap > 0 for gap in gaps):
        return "yes" if len(gaps) > 1 else "yes, one seed"
    return "no: the reverse" if all(gap < 0 for gap in gaps) else "no: level"


def cell(
    scale: str, task: str, method: str = "fedpara", split: str = "iid", gamma: float | None = None
) -> Cell:
    """The cell that tables 2 and figure 3 have of a method."""
    return Cell(task, scale, method, split, DEFAULT_GAMMA[task] if gamma is None else gamma)


def over_low_rank(task: str, split: str, gamma: float | None = None, variant: str = "") -> Measure:
    """Table 2: low-rank → FedPara of its size."""

    def measure(scale: str, results: Results) -> Finding:
        ours, others = (
            found(results, replace(cell(scale, task, method, split, gamma), variant=variant))
            for method in ("fedpara", "lowrank")
        )
        return ahead(ours, others)

    return measure


def beside_dense(task: str, split: str, method: str = "fedpara") -> Measure:
    """Dense → FedPara: comparable is no more than two points below."""

    def measure(scale: str, results: Results) -> Finding:
        ours = found(results, cell(scale, task, method, split))
        dense = found(results, cell(scale, task, "dense", split))
        finding = ahead(ours, dense)
        if finding is None:
            return None
        share = ours[0]["parameters"] / dense[0]["parameters"]
        gap = statistics.mean(r["accuracy"] for r in ours) - statistics.mean(
            r["accuracy"] for r in dense
        )
        return f"{finding[0]} with {share:.1%}", "yes" if gap >= -0.02 else f"no: {100 * gap:+.1f}"

    return measure


def fewer_bytes(task: str, split: str, method: str = "fedpara") -> Measure:
    """Figure 3: bytes to shares of the dense model's accuracy."""

    def measure(scale: str, results: Results) -> Finding:
        dense = found(results, cell(scale, task, "dense", split))
        ours = found(results, cell(scale, task, method, split))
        if not dense or not ours:
            return None
        texts, times = [], []
        for share in TARGETS:
            target = share_of(dense, share)
            theirs, sent = bytes_to(dense, target), bytes_to(ours, target)
            if theirs is None or sent is None:
                texts.append(f"{target:.1%} not reached by all")
                continue
            times.append(theirs / sent)
            texts.append(f"{times[-1]:.1f} times fewer to {target:.1%}")
        if not times or min(times) < 2.8:
            same = "no"
        else:
            same = "yes" if len(times) == len(TARGETS) else "to the lower target"
        return "; ".join(texts), same

    return measure


def rising_gamma(scale: str, results: Results) -> Finding:
    """Figure 4: rank correlation of accuracy and γ."""
    ratios = (0.1, 0.3, 0.5, 0.7, 0.9)
    rows = [found(results, replace(cell(scale, "cifar10"), gamma=g), False) for g in ratios]
    if not all(rows):
        return None
    accuracies = [row[0]["accuracy"] for row in rows]
    text = ", ".join(f"{100 * a:.1f}" for a in accuracies)
    steps = sum(b > a for a, b in pairwise(accuracies))
    return f"γ .1 to .9: {text}", "yes" if steps >= 3 else "no"


def personal(scenario: int, wanted: Callable[[dict[str, float]], bool]) -> Measure:
    """Figure 5: the methods' order."""

    def measure(scale: str, results: Results) -> Finding:
        split, share, _ = SCENARIOS[scenario]
        means = {}
        for method in ("pfedpara", "fedper", "fedavg", "local"):
            base = Cell("mnist", scale, method, split, DEFAULT_GAMMA["mnist"], share=share)
            rows = found(results, base)
            if not rows:
                return None
            means[method] = statistics.mean(row["accuracy"] for row in rows)
        order = ", ".join(
            f"{name} {100 * mean:.1f}" for name, mean in sorted(means.items(), key=lambda p: -p[1])
        )
        return order, "yes" if wanted(means) else "no"

    return measure


def strategies(scale: str, results: Results) -> Finding:
    """Table 3: the order of strategies."""
    means = {}
    for name in STRATEGIES:
        rows = found(results, replace(cell(scale, "cifar10"), strategy=name), False)
        if not rows:
            return None
        means[name] = rows[0]["accuracy"]
    order = sorted(means, key=lambda name: -means[name])
    text = ", ".join(f"{name} {100 * means[name]:.1f}" for name in order)
    same = means["FedDyn"] > means["FedAvg"] and means["Scaffold"] > means["FedAvg"]
    return text, "yes" if same else "no"


def variant(name: str) -> Measure:
    """An ablation against FedPara as it is."""

    def measure(scale: str, results: Results) -> Finding:
        base = cell(scale, "cifar10")
        rows = found(results, replace(base, variant=name))
        return ahead(rows, found(results, base)[: len(rows)])

    return measure


def quantized(scale: str, results: Results) -> Finding:
    """FedPAQ: int8 uploads."""
    plain = found(results, cell(scale, "cifar10"), False)
    rows = found(results, replace(cell(scale, "cifar10"), codec="int8"), False)
    finding = ahead(rows, plain)
    if finding is None:
        return None
    gap = rows[0]["accuracy"] - plain[0]["accuracy"]
    sent = rows[0]["bytes"] / plain[0]["bytes"]
    return f"{finding[0]}, {sent:.0%} of the bytes up and down", "yes" if gap > -0.02 else "no"


def against(task: str, split: str, method: str, other: str) -> Measure:
    """Another method → this one."""

    def measure(scale: str, results: Results) -> Finding:
        ours, others = (found(results, cell(scale, task, m, split)) for m in (method, other))
        return ahead(ours, others)

    return measure


def no_collapse(scale: str, results: Results) -> Finding:
    """How many runs without clipping fall back, of those that were made."""
    texts, fell = [], {}
    for kind in unclipped_kinds(scale, "shakespeare"):
        if rows := unclipped_rows(results, kind):
            fell[kind.method] = sum(map(collapsed, rows))
            texts.append(f"{LABELS[kind.method]} {fell[kind.method]} of {len(rows)}")
    if "fedpara" not in fell:
        return None
    return f"collapsed: {', '.join(texts)}", "no" if fell["fedpara"] else "yes"


def full_rank(scale: str, results: Results) -> Finding:
    """Figure 6."""
    rows = json.loads((RESULTS.parent / "figure6_rank.json").read_text())["rows"]
    row = next(row for row in rows if row["weight"].startswith("FedPara"))
    full = row["ranks"].get("100", 0)
    return f"{full:,} of {row['draws']:,}", "yes" if full == row["draws"] else "no"


def counted(
    names: list[str], column: str, paper: str = "the paper's", within: float = 0
) -> Measure:
    """What :mod:`counts` has found, in rows by their first column, beside the paper's."""

    def measure(scale: str, results: Results) -> Finding:
        rows = json.loads((RESULTS / "counts.json").read_text())["rows"]
        chosen = [row for name in names for row in rows if next(iter(row.values())) == name]
        assert len(chosen) == len(names), names
        gaps = [abs(_number(row[column]) - _number(row[paper])) for row in chosen]
        return "; ".join(row[column] for row in chosen), "yes" if max(gaps) <= within else "no"

    return measure


def _number(text: str) -> float:
    return float(text.replace(",", "").rstrip("%"))
