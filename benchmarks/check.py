"""Whether the committed ratios still hold here: a few of the headline rows, measured again.

    python benchmarks/check.py [--seconds 2]

A row holds if the committed ratio lies within 10% of the median of the pairs measured now, or
between their quarters. The exit code is 1 if any does not. Ratios depend on the CPU and on how many
threads it has: where those are others than the committed table's, that is said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from adapters import CASES, build, step
from from_scratch import cases, steps, targets_of
from measure import paired
from peft import get_peft_model
from report import RESULTS, environment, table
from torch import nn

from fedpara_peft import FedParaConfig

#: Of ``adapters.py``: outputs, inputs, tokens, r; and of ``from_scratch.py``.
LAYERS = ((768, 768, 512, 8), (4096, 4096, 64, 8), (2048, 2048, 512, 16))
MODELS = ("MLP, batch 10", "LSTM 2x256, T 80, batch 64", "VGG16-GN, batch 64")
#: How far a ratio may be off where its own pairs agree better than that; the machine's noise.
TOLERANCE = 0.10


def main() -> int:
    """Measure, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="per method and row")
    options = parser.parse_args()
    here = environment("cpu")
    lines, failed = [], 0
    for name, measured in (("adapters", layers), ("from_scratch", models)):
        then = committed(name)
        other = [what for what in ("cpu", "threads") if then[what] != here[what]]
        if other:
            print(f"{name}: measured then with {', '.join(f'{w} {then[w]}' for w in other)}, "
                  f"now with {', '.join(f'{w} {here[w]}' for w in other)}")  # fmt: skip
        for row, what, ratios in measured(then["rows"], options.seconds):
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            good = holds(row[what], ratios)
            failed += not good
            shown = f"{median:.3f} [{low:.3f}–{high:.3f}]"
            lines.append([_name(row), what, f"{row[what]:.3f}", shown, "yes" if good else "NO"])
            print(lines[-1], flush=True)
    print(table(["row", "ratio", "committed", "here", "holds"], lines))
    return int(failed > 0)


def holds(committed: float, ratios: list[float]) -> bool:
    """Whether a committed ratio agrees with paired ratios that were measured again."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    near = abs(committed / median - 1) <= TOLERANCE
    return near or low <= committed <= high


def committed(name: str) -> dict[str, Any]:
    """The committed table of this CPU's instructions."""
    capability = torch.backends.cpu.get_cpu_capability()
    own = RESULTS / f"{name}-{capability.lower()}.json"
    found: dict[str, Any] = json.loads(
        (own if own.exists() else RESULTS / f"{name}.json").read_text()
    )
    return found


def layers(rows: list[dict[str, Any]], seconds: float) -> Iterator[tuple[Any, str, list[float]]]:
    """A training step of an adapted layer, of the frozen layer's and of LoHa's."""
    for m, n, tokens, r in LAYERS:
        assert (m, n, tokens, r, torch.float32) in CASES
        case = {"m": m, "n": n, "tokens": tokens, "r": r, "dtype": "float32"}
        row = next((x for x in rows if case.items() <= x.items()), None)
        if row is None:
            continue
        torch.manual_seed(0)
        base = nn.Linear(n, m)
        x, grad = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, m)
        kinds = ("fedpara", "frozen", "loha")
        times = paired({k: step(build(k, base, r), x, grad) for k in kinds}, seconds)
        for other in kinds[1:]:
            yield row, f"fedpara/{other}", _ratios(times, "fedpara", other)


def models(rows: list[dict[str, Any]], seconds: float) -> Iterator[tuple[Any, str, list[float]]]:
    """A whole step with replaced weights, of the dense model's."""
    for name in MODELS:
        row = next((x for x in rows if x.get("model") == name), None)
        if row is None:
            continue
        build_net, wanted, gamma, x, y = cases()[name]
        runs = {}
        for way in ("fedpara", "dense"):
            torch.manual_seed(0)
            net = build_net()
            if way == "fedpara":
                config = FedParaConfig(
                    gamma=gamma, base_weight="replaced", target_modules=targets_of(net, wanted)
                )
                net = get_peft_model(net, config)
            runs[way] = steps(net, x, y, way)[1]
        yield row, "fedpara/dense", _ratios(paired(runs, 2 * seconds), "fedpara", "dense")


def _ratios(times: dict[str, list[float]], one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


def _name(row: dict[str, Any]) -> str:
    return row.get("model") or f"{row['m']}x{row['n']}, {row['tokens']} tokens, r = {row['r']}"


if __name__ == "__main__":
    sys.exit(main())
