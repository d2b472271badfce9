"""The fine-tuning runs as tables."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from pool import Results
from report import table

from .cells import ADAPTERS, GRIDS, NOT_TUNED, RESULTS, SEEDS, TEXTS, WAYS, WITH_SGD, Tune
from .pictures import loss_for_bytes

ABOUT = {
    "stdlib": "Python's standard library, a package or module for each client",
    "shakespeare": "the plays of tiny Shakespeare, a role for each client",
}


def write(results: Results[Tune]) -> None:
    """Write ``results/finetune.md`` of all scales and texts that were run."""
    parts = [
        part
        for scale in ("gpu", "cpu")
        for text in TEXTS
        if (part := section(results, scale, text))
    ]
    if not parts:
        return
    intro = (
        "# Fine-tuning a language model: adapters of equal size\n\n"
        "SmolLM2-135M-Instruct (dequantized from Q4_1), frozen; adapters in all linear layers, or "
        "where said so in some; every method's learning rate is tuned by the same rule: runs "
        "of another seed over a grid that grows at an end where the best lies. Loss: mean "
        "over the tokens of all clients' held-out text, ± standard deviation of the seeds.\n"
    )
    (RESULTS.parent / "finetune.md").write_text(intro + "\n" + "\n\n".join(parts) + "\n")


def section(results: Results[Tune], scale: str, text: str) -> str:
    """A text at a scale; empty if nothing was run."""
    kinds = [
        Tune(text, adapter, scale, optim)
        for optim in GRIDS
        for adapter in ADAPTERS
        if scale == "gpu" or (optim == "adamw" and adapter in ("frozen", "LoRA", "FedPara"))
        if optim == "adamw" or adapter in WITH_SGD
    ]
    of = kinds[0].of
    trained = [kind for kind in kinds if kind.adapter != "frozen"]
    lengths = {
        of.num_rounds if rounds is None else rounds: rounds
        for rounds in (of.tuning_rounds, None)
        if any(found(results, replace(kind, rounds=rounds)) for kind in trained)
    }
    lines, absent = [], []
    some: dict[str, Any] = {}
    for kind in kinds:
        runs = [found(results, replace(kind, rounds=rounds)) for rounds in lengths.values()]
        if not any(runs):
            absent.append(kind.label)
            continue
        some = next(rows[0] for rows in reversed(runs) if rows)
        if kind.adapter == "frozen":
            lines.append([kind.adapter, "", "", *[shown(some), ""] * len(lengths), ""])
            continue
        tuned = results.tuned(kind)
        assert tuned is not None
        a_round = some["bytes"] / some["curve"][-1][0]
        cells = [part for rows in runs for part in (losses(rows), ", ".join(map(shown, rows)))]
        lines.append([
            kind.label, f"{some['parameters']:,}", f"{a_round / 1e6:,.1f}",
            *cells, f"{tuned.learning_rate:g}",
        ])  # fmt: skip
    if not lines:
        return ""
    targets = "all linear layers" if of.targets == "all-linear" else ", ".join(of.targets)
    train, held_out = some["examples"]
    versions = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
    setting = (
        f"`python benchmarks/finetune/run.py --scale {scale} --texts {text}`\n\n"
        f"{some['hardware']}, {versions}\n\n"
        f"{of.num_clients} clients with {train:,} examples of {of.length} tokens, {held_out:,} "
        f"held out; {of.clients_per_round} a round, {of.num_rounds} rounds, "
        f"{of.tuning_rounds} in tuning; {of.num_local_epochs} local epochs, "
        f"batch {of.batch_size}; r = {of.r} in {targets}; rates rise for a round and fall to "
        "nothing; gradients clipped at norm 1."
    )
    by_length = [name for n in lengths for name in (f"loss, {n} rounds", "every seed's")]
    head = [f"adapter{at(kinds[0])}", "parameters", "MB a round", *by_length, "rate"]
    not_run = f"Not run: {'; '.join(absent)}." if absent else ""
    parts = [f"## {text}: {ABOUT[text]}", setting, table(head, lines), not_run]
    own = [Tune(text, a, scale, way=way) for way, tried in WAYS.items() for a in tried]
    own = [kind for kind in own if kind.way not in NOT_TUNED]
    parts += [ways(results, scale, text), tuning(results, [*kinds, *own])]
    return "\n\n".join(part for part in parts if part)


def ways(results: Results[Tune], scale: str, text: str) -> str:
    """How an adapter is federated, beside the plain way, and a picture; empty without any."""
    kinds = [Tune(text, adapter, scale) for adapter in ("LoRA", "FedPara")]
    kinds += [Tune(text, adapter, scale, way=way) for way, of in WAYS.items() for adapter in of]
    runs = {kind: rows for kind in kinds if (rows := found(results, kind))}
    goals = {row["cell"]["seed"]: row["loss"] for row in runs.get(kinds[0], [])}
    if len(goals) < len(SEEDS) or len(runs) <= 2:
        return ""
    lines = []
    for kind, rows in runs.items():
        rate = results.tuned(kind).learning_rate
        a_round = statistics.mean(row["bytes"] / row["curve"][-1][0] for row in rows)
        reached = [sent_until(row["curve"], goals[row["cell"]["seed"]]) for row in rows]
        there = [sent for sent in reached if sent is not None]
        lines.append([
            kind.label.removesuffix(f", {kind.optim}"), f"{a_round / 1e6:,.2f}", losses(rows),
            ", ".join(map(shown, rows)),
            f"{statistics.mean(there) / 1e6:,.1f}" if there else "",
            f"{len(there)} of {len(rows)}", f"{rate:g}",
        ])  # fmt: skip
    head = [
        f"adapter, way{at(kinds[0])}", "MB a round", f"loss, {kinds[0].of.num_rounds} rounds",
        "every seed's", "MB to LoRA's loss", "seeds that reach it", "rate",
    ]  # fmt: skip
    file = RESULTS.parent / f"finetune-{kinds[0].file}.png"
    curves = {(kind.adapter, kind.way): mean_curve(rows) for kind, rows in runs.items()}
    loss_for_bytes(curves, file, f"SmolLM2-135M over {kinds[0].of.num_clients} clients")
    return (
        "How an adapter is federated; codecs have the rate that was tuned for the plain way, the "
        "others, but where it is said so, their own. MB count both directions. «MB to LoRA's "
        "loss»: until the held-out loss is that of the plain LoRA's last round with the same seed, "
        "linear between evaluated rounds, mean of the seeds that reach it.\n\n"
        f"{table(head, lines)}\n\n"
        f"![held-out loss against rounds and megabytes]({file.name})"
    )


def sent_until(curve: list[tuple[int, int, float]], goal: float) -> float | None:
    """Bytes sent until a loss was reached, linear between evaluated rounds; None if it never was.

    Args:
        curve: round, bytes until then and loss of every evaluated round.
        goal: the loss.
    """
    before: tuple[float, float] | None = None
    for _, sent, loss in curve:
        if loss <= goal:
            if before is None:
                return float(sent)
            share = (before[1] - goal) / (before[1] - loss)
            return before[0] + share * (sent - before[0])
        before = sent, loss
    return None


def mean_curve(rows: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Round, megabytes and loss, each a mean of the seeds."""
    points = zip(*(row["curve"] for row in rows), strict=True)
    return [
        (at[0][0], *(statistics.mean(p[i] for p in at) / (1e6, 1)[i - 1] for i in (1, 2)))
        for at in points
    ]


def tuning(results: Results[Tune], kinds: list[Tune]) -> str:
    """Loss by learning rate, of the runs that tuned the rates."""
    runs = {}
    for kind in kinds:
        cells, best = results.tuning(kind)
        if kind.adapter != "frozen" and best is not None:
            name = kind.label
            runs[name] = {c.learning_rate: results.found[c.key()] for c in cells}
    columns = sorted({rate for of in runs.values() for rate in of if rate is not None})
    lines = [[name, *(shown(of[rate]) if rate in of else "" for rate in columns)]
             for name, of in runs.items()]  # fmt: skip
    what = f"held-out loss of the tuning runs{at(kinds[0])}"
    head = [what, *(f"rate {rate:g}" for rate in columns)]
    return table(head, lines)


def at(kind: Tune) -> str:
    """What tells the rows of another scale from those of the first, for whoever refers to one."""
    return "" if kind.scale == "gpu" else f" ({kind.scale})"


def found(results: Results[Tune], kind: Tune) -> list[dict[str, Any]]:
    """What there is of a kind, by seed."""
    rows = [results.get(replace(kind, seed=seed)) for seed in SEEDS]
    return [row for row in rows if row is not None]


def losses(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation."""
    values = [row["loss"] for row in rows if row["loss"] is not None]
    if len(values) < len(rows) or len(values) < 2:
        return ", ".join(shown(row) for row in rows)
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def shown(row: dict[str, Any]) -> str:
    """A run's loss."""
    return "diverged" if row["diverged"] or row["loss"] is None else f"{row['loss']:.4f}"
