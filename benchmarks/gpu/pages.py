"""Tables of the rows, a page a subject. Needs no torch."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cost_rule
import rows

Row = dict[str, Any]

WHAT = {"fedpara": "FedPara", "frozen": "frozen", "lora": "LoRA, rank 2r", "loha": "LoHa",
        "lycoris": "LyCORIS", "merged": "merged", "dense": "dense"}  # fmt: skip
NOTE = (
    "Times are medians over blocks of calls, methods in turn; in brackets the quarters below and "
    "above. A ratio is that of blocks of one turn: below 1, the first is faster. A layer alone "
    "finds its weights in the cache, where a model's do not fit."
)


def write(out: Path) -> int:
    """Write every page of which there are rows; 1 if a page cannot be made."""
    found = rows.read(out)
    failed = 0
    for name, (title, parts, content) in PAGES.items():
        mine = [row for row in found if row["part"] in parts]
        if not any(row["table"] != "environment" for row in mine):
            continue
        try:
            text = "\n\n".join([f"# {title}", _machine(mine), *content(mine), *_left_out(mine)])
        except Exception as error:  # the other pages are still wanted
            print(f"{name}.md: {type(error).__name__}: {error}", flush=True)
            failed = 1
            continue
        (out / f"{name}.md").write_text(text + "\n")
    return failed


def _machine(found: Sequence[Row]) -> str:
    seen: dict[str, None] = {}
    for row in found:
        if row["table"] == "environment":
            where = {k: v for k, v in row.items() if k not in ("part", "table", "command")}
            shown = ", ".join(f"{k} {v}" for k, v in where.items() if v is not None)
            seen[f"`{row['command']}`\n\n{shown}"] = None
    return "\n\n".join(seen)


def _left_out(found: Sequence[Row]) -> list[str]:
    text = []
    for row in found:
        if row["table"] == "cut":
            text.append(f"- {row['part']}: there was time for {row['done']} of {row['of']} cases.")
        if row["table"] == "error":
            text.append(f"- {row['part']}, {row['of']}, {row['case']}: {row['error']}")
        for peer, why in (
            row.get("failed", {}).items() if isinstance(row.get("failed"), dict) else ()
        ):
            text.append(f"- {peer} cannot do {_case(row)}: {why}")
    return ["## What failed or is missing", "\n".join(dict.fromkeys(text))] if text else []


def _layer(row: Row) -> str:
    return f"{row['m']}x{row['n']}, {row['tokens']} token" + "s" * (row["tokens"] > 1)


def _case(row: Row) -> str:
    names = ("m", "n", "tokens", "r", "precision")
    return ", ".join(f"{n} {row[n]}" for n in names if n in row)


def table(header: Sequence[str], lines: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table; numbers, in all columns but the first, are aligned right."""
    all_lines = [header, ["---"] + ["---:" if numbers else "---"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in all_lines)


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def spread(values: Sequence[float] | None) -> str:
    """A median with its quarters."""
    if values is None:
        return "-"
    middle, low, high = values
    return f"{number(middle)} [{number(low)}–{number(high)}]"


def _of(row: Row, others: Sequence[str]) -> list[str]:
    return [spread(row["of"].get(other)) for other in others]


def _megabytes(row: Row, what: str, kinds: Sequence[str]) -> str:
    found = row.get("bytes", {})
    return " / ".join(f"{found[kind][what] / 1e6:.0f}" if kind in found else "-" for kind in kinds)


def _of_table(found: Sequence[Row], *names: str) -> list[Row]:
    return [row for row in found if row["table"] in names and "skipped" not in row]


# Pages.


def correctness(found: Sequence[Row]) -> list[str]:
    """Largest relative errors, layer by layer, and what else was checked."""
    text = [
        "Relative error (norm of the difference over norm) of the worst output and of the worst "
        "gradient, of all parameterizations and ways of computing, against the plain layer in "
        "float64 on the CPU. float32 without tf32 unless it says so."
    ]
    layers = _of_table(found, "layers")
    ways = list(dict.fromkeys(row["way"] for row in layers))
    by_case: dict[tuple[str, str], dict[str, Row]] = collections.defaultdict(dict)
    for row in layers:
        by_case[row["kind"], row["mode"]][row["way"]] = row
    bounds = {row["way"]: row["bound"] for row in layers}
    header = ["layer", "weight", *(f"{way} (< {bounds[way]:g})" for way in ways)]
    lines = [
        [kind, mode, *(_errors(by_way.get(way)) for way in ways)]
        for (kind, mode), by_way in by_case.items()
    ]
    if lines:
        text.append(table(header, lines))
    checks = []
    for row in _of_table(found, "checkpoint", "merge", "federation", "federation, other device",
                         "generators", "compiled"):  # fmt: skip
        of = (
            str(row[k])
            for k in ("kind", "mode", "path", "way", "strategy", "parameterization", "variant")
            if row.get(k)
        )
        within = f"{row['error']['output']:.1e} < {row['bound']:g}" if row.get("bound") else "equal"
        checks.append([f"{_CHECKS[row['table']]}: {', '.join(of) or 'FedPara'}", within])
    if checks:
        text.append(table(["check", "found"], checks))
    for row in _of_table(found, "suite"):
        text.append(f"`{row['suite']}` on the device: {row['counts']}; failed: {row['failed']}")
    return text


_CHECKS = {
    "checkpoint": "adapt a Llama, save, load: bits",
    "merge": "merge twice: bits; merged and unmerged outputs",
    "federation": "resume after 3 of 5 rounds: bits",
    "federation, other device": "engines, and device against CPU",
    "generators": "global generators are put back",
    "compiled": "compiled, against not compiled",
}


def _errors(row: Row | None) -> str:
    if row is None:
        return "failed, or not run"
    return f"{row['error']['output']:.0e} / {row['error']['gradient']:.0e}"


def adapters(found: Sequence[Row]) -> list[str]:
    """Layers, then the Llama, inference, and what compiling does."""
    text = [
        f"FedPara's adapter of rank r; LoRA of rank 2r and LoHa of rank r have as many parameters. "
        f"bf16: bfloat16 base, float32 adapters (PEFT's default); bf16 all: both. {NOTE}"
    ]
    others = ("frozen", "lora", "loha", "lycoris")
    heads = [f"of {WHAT[o]}" for o in others]
    shown = _of_table(found, "llama")
    if shown:
        lines = [
            [f"{what}, {row['precision']}, r = {row['r']}", spread(run["ms"]["fedpara"]),
             *_of(run, others[:3]), _megabytes(run, "peak", ("fedpara", "lora", "loha"))]
            for row in shown for what, run in row["runs"].items()
        ]  # fmt: skip
        text += [
            "## A Llama of 16 layers, width 2048; all linear layers but the head adapted",
            table(["", "ms", *heads[:3], "peak, MB: FedPara / LoRA / LoHa"], lines),
        ]
    shown = _of_table(found, "layer")
    if shown:
        lines = [
            [_layer(row), str(row["r"]), row["precision"],
             spread(row["ms"]["fedpara"]), *_of(row, others),
             _megabytes(row, "kept", ("fedpara", "loha")),
             _megabytes(row, "peak", ("fedpara", "lora", "loha"))]
            for row in shown
        ]  # fmt: skip
        header = ["M x N", "r", "precision", "ms", *heads, "kept, MB: FedPara / LoHa",
                  "peak, MB: FedPara / LoRA / LoHa"]  # fmt: skip
        text += ["## A training step of one linear layer", table(header, lines)]
    shown = _of_table(found, "inference")
    if shown:
        lines = [
            [_layer(row), str(row["r"]), row["precision"],
             spread(row["ms"]["fedpara"]), *_of(row, (*others, "merged")),
             number(row["ms"]["merged"][0] / row["ms"]["frozen"][0])]
            for row in shown
        ]  # fmt: skip
        header = ["M x N", "r", "precision", "ms", *heads, "of merged", "merged, of frozen"]
        text += ["## Inference of one linear layer", table(header, lines)]
    shown = _of_table(found, "captured layer")
    if shown:
        lines = [
            [_layer(row), str(row["r"]), row["precision"],
             spread(row["ms"]["fedpara"]), *_of(row, others)]
            for row in shown
        ]  # fmt: skip
        text += [
            "## The same training step as a CUDA graph: kernels alone, no launching",
            table(["M x N", "r", "precision", "ms", *heads], lines),
        ]
    shown = _of_table(found, "compiled layer", "compiled llama")
    if shown:
        lines = [
            [_layer(row) if "m" in row
             else "two layers of the Llama, 4 x 512 tokens",
             str(row["r"]), row["precision"], spread(row["ms"]["fedpara"]),
             *_of(row, ("not compiled", *others[:3]))]
            for row in shown
        ]  # fmt: skip
        header = ["case", "r", "precision", "ms", "of itself, not compiled", *heads[:3]]
        text += ["## Compiled (each method by `torch.compile`)", table(header, lines)]
    return text


def from_scratch(found: Sequence[Row]) -> list[str]:
    """Models, single convolutions, compiled models."""
    others = ("dense", "compose", "khatri_rao", "einsum")
    heads = ["auto, of dense", "of compose", "of khatri_rao", "of einsum"]
    text = [
        "Replaced weights, γ = 0.1 (LSTM: 0); a step is forward, loss, backward and SGD. The ways "
        "are values of `compute_path`; `einsum` composes as the paper's published notebook does. "
        + NOTE
    ]
    shown = _of_table(found, "model")
    if shown:
        lines = [
            [f"{row['net']}, batch {row['batch']}", row["setting"], spread(row["ms"]["dense"]),
             *_of(row, others), _megabytes(row, "peak", ("dense", "auto", "einsum"))]
            for row in shown
        ]  # fmt: skip
        header = ["model", "precision", "dense, ms", *heads, "peak, MB: dense / auto / einsum"]
        text += ["## A training step of a whole model", table(header, lines)]
    shown = _of_table(found, "compiled model")
    if shown:
        lines = [
            [f"{row['net']}, batch {row['batch']}", row["setting"], spread(row["ms"]["dense"]),
             *_of(row, ("dense", "not compiled"))]
            for row in shown
        ]  # fmt: skip
        header = ["model", "precision", "dense, ms", "of dense", "of itself, not compiled"]
        text += ["## Compiled (both by `torch.compile`)", table(header, lines)]
    shown = _of_table(found, "convolution")
    if shown:
        lines = [
            [f"{row['channels']} channels, {row['pixels']}x{row['pixels']}, batch {row['batch']}",
             row["setting"], "last" if row["last"] else "first", spread(row["ms"]["dense"]),
             *_of(row, others)]
            for row in shown
        ]  # fmt: skip
        header = ["3x3 convolution", "precision", "channels", "dense, ms", *heads]
        text += ["## Forward and backward of one convolution", table(header, lines)]
    return text


def cost(found: Sequence[Row]) -> list[str]:
    """How often the rule is right, and what it costs where it is not."""
    cases = _of_table(found, "linear", "conv")
    groups: dict[tuple[str, ...], list[Row]] = collections.defaultdict(list)
    for row in cases:
        groups[cost_rule.group(row)].append(row)
    lines = []
    for name in sorted(groups):
        mine = groups[name]
        losses = [cost_rule.loss(row, cost_rule.chosen(row)) for row in mine]
        worst = max(range(len(mine)), key=losses.__getitem__)
        constant = [
            sum(cost_rule.loss(row, way) for row in mine) / len(mine)
            for way in ("compose", "khatri_rao")
        ]
        lines.append([
            ", ".join(name), str(len(mine)),
            f"{sum(x <= 0.03 for x in losses) / len(mine):.0%}",
            f"{sum(losses) / len(mine):.1%}", f"{losses[worst]:.0%}", cost_rule.said(mine[worst]),
            f"{constant[0]:.0%}", f"{constant[1]:.0%}",
        ])  # fmt: skip
    header = ["", "cases", "within 3% of the best", "mean loss", "worst loss", "there",
              "mean loss of compose alone", "of khatri_rao alone"]  # fmt: skip
    text = [
        "What `compute_path=\"auto\"` takes, beside the faster of both ways, by medians. The loss "
        "is the extra time, relative to the faster way. The rule's constants were fitted to "
        f"these times (`cost_rule.py` fits them to a half and judges them on the other). {NOTE}",
        table(header, lines),
    ]  # fmt: skip
    bad = sorted(cases, key=lambda row: cost_rule.loss(row, cost_rule.chosen(row)), reverse=True)[
        :25
    ]
    lines = [
        [cost_rule.said(row), ", ".join(cost_rule.group(row)), cost_rule.chosen(row),
         spread(row["ms"]["compose"]), spread(row["ms"]["khatri_rao"]),
         f"{cost_rule.loss(row, cost_rule.chosen(row)):.0%}"]
        for row in bad
    ]  # fmt: skip
    text += [
        "## The worst choices",
        table(["case", "", "taken", "compose, ms", "khatri_rao, ms", "loss"], lines),
    ]
    return text


def federation(found: Sequence[Row]) -> list[str]:
    """Engines, and the paper's run."""
    text = []
    shown = _of_table(found, "clients")
    if shown:
        lines = [
            [f"{row['net']}, " + ("dense" if row["r"] is None else f"r = {row['r']}"),
             f"{row['values']:,}", str(row["cohort"]), spread(row["ms"]["sequential"]),
             spread(row["ms"]["batched"]), spread(row["of"]["sequential"]), row["takes"]]
            for row in shown
        ]  # fmt: skip
        header = ["net", "values", "clients a round", "sequential, ms a client",
                  "batched, ms a client", "of sequential", "engine='auto' takes"]  # fmt: skip
        text += [
            "## Clients one after the other, and side by side",
            "80 examples a client, batches of 10, one epoch. MLP 784-200-10, its first layer "
            "factorized; CNN of two 5x5 convolutions, the second factorized. Medians of rounds, "
            "in brackets the quarters below and above.",
            table(header, lines),
        ]
    runs = _of_table(found, "run")
    if runs:
        last = runs[-1]
        curve = ", ".join(f"{r} {v:.1%} ({b / 1e6:,.0f} MB)" for r, b, v in _points(last["curve"]))
        text += [
            "## The paper's CIFAR-10 run",
            f"{last['rounds']} of {last['of']} rounds, {last['seconds']:.0f} s, "
            f"{last['turn_s']:.2f} s a client's turn. Test accuracy by round: {curve}.",
        ]
    text += [f"The paper's run is left out: {row['why']}." for row in found if "why" in row]
    return text


def _points(curve: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    return [point for index, point in enumerate(curve) if index % max(1, len(curve) // 12) == 0]


PAGES: dict[str, tuple[str, tuple[str, ...], Callable[[Sequence[Row]], list[str]]]] = {
    "correctness": ("On the GPU: what it computes", ("correctness", "suites"), correctness),
    "adapters": ("On the GPU: adapters", ("adapters", "compiled"), adapters),
    "from_scratch": ("On the GPU: training from scratch", ("from_scratch", "compiled"),
                     from_scratch),
    "cost": ("On the GPU: does the cost rule take the faster way", ("cost",), cost),
    "federation": ("On the GPU: federations", ("clients", "paper"), federation),
}  # fmt: skip
