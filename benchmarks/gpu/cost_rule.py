r"""The cost rule beside what was measured, and constants that fit a device better.

    python3 benchmarks/gpu/cost_rule.py [benchmarks/results/gpu]

Prints, for the rule as it is and for rules of more terms, the mean and worst loss over the measured
cases, each rule fitted on one half of them and judged on the other.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedpara_peft.maths.cost import ACCELERATOR, Costs, operations

Row = dict[str, Any]
OF_ACCELERATORS = (ACCELERATOR.weight_pass, ACCELERATOR.activation_pass, ACCELERATOR.launches)


def loss(row: Row, way: str) -> float:
    """Extra time of a way, relative to the faster one."""
    times = {name: row["ms"][name][0] for name in ("compose", "khatri_rao")}
    return float(times[way] / min(times.values()) - 1)


def group(row: Row) -> tuple[str, ...]:
    """Layer kind, precision, weight, and whether it trains."""
    mode = "training" if row["training"] else "inference"
    return (row["table"], row["precision"], row["base"], mode)


def said(row: Row) -> str:
    """A case in words."""
    if row["table"] == "linear":
        return f"{row['m']}x{row['n']}, {row['tokens']} tokens, r = {row['r']}"
    return (
        f"{row['channels']} channels, {row['kernel']}x{row['kernel']}, {row['pixels']}² pixels, "
        f"batch {row['batch']}, r = {row['r']}"
    )


def counted(
    row: Row, pass_cost: float, activation: float, launch: float = 0.0, wide: float = 1.0
) -> tuple[float, float]:
    """Operations of (form, compose) as ``maths/cost.py`` counts them.

    Args:
        row: a measured case.
        pass_cost: what an entry of a weight or of the form costs beside its products.
        activation: what an entry of an activation costs the form.
        launch: operations that the launches of a linear layer's form are worth.
        wide: what an operation of the form's narrow products costs, in units of a wide one's.
    """
    linear = row["table"] == "linear"
    p, training = row["positions"], row["training"]
    form, compose = operations(
        positions=p, dense=row["dense"], form=row["form"], r=row["rank"],
        features=row["m"] + row["n"] if linear else 2 * row["channels"],
        training=training, joined=row["joined"],
        costs=Costs(pass_cost, pass_cost, activation, launch if linear else 0),
    )  # fmt: skip
    return form + (6 if training else 2) * p * (wide - 1) * row["form"], compose


def chosen(row: Row, *constants: float) -> str:
    """What the rule takes with these constants, or with an accelerator's."""
    form, compose = counted(row, *(constants or OF_ACCELERATORS))
    return "khatri_rao" if form <= compose else "compose"


def judged(cases: Sequence[Row], choose: Callable[[Row], str]) -> tuple[float, float, float]:
    """Mean and worst loss, and the share of cases within 3% of the best."""
    losses = [loss(row, choose(row)) for row in cases]
    close = sum(x <= 0.03 for x in losses) / len(losses)
    return sum(losses) / len(losses), max(losses), close


def fitted(cases: Sequence[Row], grid: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The constants of least mean loss; of equal ones those nearest the beginning of the grid."""
    return min(
        itertools.product(*grid), key=lambda c: judged(cases, lambda row: chosen(row, *c))[0]
    )


PASS_COSTS = [2.0**k for k in range(0, 16)]
ACTIVATIONS = [0, *(2.0**k for k in range(4, 12))]
LAUNCHES = [0, *(2.0**k for k in range(18, 37))]
WIDTHS = [1.0, 0.5, 0.7, 1.5, 2.0, 3.0, 4.0, 8.0]


def main() -> None:
    """Print the rules side by side."""
    import rows

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "results/gpu"
    cases = [r for r in rows.read(folder) if r["table"] in ("linear", "conv") and "ms" in r]
    if not cases:
        raise SystemExit(f"{folder} has no rows of the part `cost`: run it first")
    random.Random(1).shuffle(cases)
    halves = cases[::2], cases[1::2]
    rules = {
        "as it is": [[cost] for cost in OF_ACCELERATORS],
        "pass costs": [PASS_COSTS, ACTIVATIONS],
        "pass costs, launch": [PASS_COSTS, ACTIVATIONS, LAUNCHES],
        "pass costs, launch, narrow": [PASS_COSTS[6:12], ACTIVATIONS, LAUNCHES[-6:], WIDTHS],
    }
    print("all together: rule, constants fitted on a half, on the other: mean, worst, within 3%")
    _print(halves, rules)
    for name in sorted({group(row) for row in cases}):
        mine = [[row for row in half if group(row) == name] for half in halves]
        if min(map(len, mine)) >= 4:
            print(", ".join(name))
            _print(mine, rules)


def _print(halves: Sequence[Sequence[Row]], rules: dict[str, list[list[float]]]) -> None:
    for name, grid in rules.items():
        constants = fitted(halves[0], grid)
        mean, worst, close = judged(halves[1], lambda row, c=constants: chosen(row, *c))  # type: ignore[misc]
        print(f"  {name:26} {constants!s:36} {mean:7.1%} {worst:6.0%} {close:6.0%}")
    for way in ("compose", "khatri_rao"):
        mean, worst, close = judged(halves[1], lambda _, w=way: w)  # type: ignore[misc]
        print(f"  {way + ' alone':26} {'':36} {mean:7.1%} {worst:6.0%} {close:6.0%}")


if __name__ == "__main__":
    main()
