"""What the optimizer costs of a client's step: ours for plain SGD, and torch's class for the same.

    python benchmarks/client_step.py [--quick]

An MLP whose first layer is FedPara of rank 4, batch 10, one thread: forward and backward, and the
optimizer's step, all ways in turn. Shortest of the runs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from measure import paired
from peft import get_peft_model
from report import table, write
from torch import nn

from fedpara_peft import FedParaConfig
from fedpara_peft.federation.client.sgd import step_of

SHAPES = ((16, 32, 4), (784, 200, 10), (784, 200, 200, 200, 10))


def build(widths: tuple[int, ...]) -> nn.Module:
    """The net."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for m, n in itertools.pairwise(widths):
        layers += [nn.Linear(m, n), nn.ReLU()]
    config = FedParaConfig(r=4, base_weight="replaced", target_modules=["0"])
    return get_peft_model(nn.Sequential(*layers[:-1]), config)


WAYS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": torch.optim.SGD,
    "torch.optim.SGD": torch.optim.SGD,
    "with foreach": functools.partial(torch.optim.SGD, foreach=True),
    "fused": functools.partial(torch.optim.SGD, fused=True),
}
OPTIONS = ({}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.01})


def case(widths: tuple[int, ...], options: dict[str, float], seconds: float) -> dict[str, Any]:
    """A model's step in every way, in microseconds, and in units of ours."""
    model = build(widths)
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, y = torch.randn(10, widths[0]), torch.randint(widths[-1], (10,))

    def both(step: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for p in parameters:
                p.grad = None
            nn.functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                step()

        return run

    made = {name: way(parameters, 1e-6, **options) for name, way in WAYS.items()}
    steps = {n: step_of(o) if n == "ours" else o.step for n, o in made.items()}
    times = paired({name: both(step) for name, step in steps.items()}, seconds)
    return {
        "model": "-".join(map(str, widths)),
        "tensors": len(parameters),
        **{name: options.get(name, 0.0) for name in ("momentum", "weight_decay")},
        "ours_us": 1e3 * min(times["ours"]),
        **{name: min(times[name]) / min(times["ours"]) for name in list(WAYS)[1:]},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a case, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(itertools.product(SHAPES, OPTIONS))
    rows = [case(*c, 0.2 if options.quick else 3.0) for c in cases[: 1 if options.quick else None]]
    others = list(WAYS)[1:]
    lines = [
        [
            row["model"], str(row["tensors"]), f"{row['momentum']:g}", f"{row['weight_decay']:g}",
            f"{row['ours_us']:.0f}", *(f"{row[name]:.2f}" for name in others),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["model", "tensors", "momentum", "weight decay", "ours, µs a step", *others]
    text = table(header, lines) + (
        "\n\nA step is forward, backward and the optimizer's step. The last columns are the same "
        "step with torch's class (as it is, `foreach=True`, `fused=True`), in units of ours. "
        "Shortest of the runs in turn."
    )
    if options.quick:
        print(text)
    else:
        write("client_step", "The optimizer's share of a client's step", text, rows, "cpu")


if __name__ == "__main__":
    main()
