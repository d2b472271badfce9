"""What the optimizer costs of a client's step: torch's class, its function, the same by hand.

    python benchmarks/client_step.py [--quick]

An MLP whose first layer is FedPara of rank 4, batch 10, one thread: forward and backward, and the
optimizer's step in turn with it. Medians of paired runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import paired
from peft import get_peft_model
from report import table, write
from torch import nn
from torch.optim.sgd import sgd

from fedpara_peft import FedParaConfig

SHAPES = ((16, 32, 4), (784, 200, 10), (784, 200, 200, 200, 10))


def build(widths: tuple[int, ...]) -> nn.Module:
    """The net."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for m, n in itertools.pairwise(widths):
        layers += [nn.Linear(m, n), nn.ReLU()]
    config = FedParaConfig(r=4, base_weight="replaced", target_modules=["0"])
    return get_peft_model(nn.Sequential(*layers[:-1]), config)


def by_hand(parameters: list[nn.Parameter], momentum: float) -> Callable[[], None]:
    """SGD with as few calls as there can be."""
    velocity: list[torch.Tensor] = []

    def step() -> None:
        steps = [p.grad for p in parameters]
        with torch.no_grad():
            if momentum and not velocity:
                velocity.extend(g.clone() for g in steps)
            elif momentum:
                torch._foreach_mul_(velocity, momentum)
                torch._foreach_add_(velocity, steps)
            torch._foreach_add_(parameters, velocity if momentum else steps, alpha=-1e-6)

    return step


def by_function(parameters: list[nn.Parameter], momentum: float) -> Callable[[], None]:
    """SGD by torch's function."""
    buffers: list[Any] = [None] * len(parameters)

    def step() -> None:
        with torch.no_grad():
            sgd(
                parameters, [p.grad for p in parameters], buffers, foreach=True, weight_decay=0.0,
                momentum=momentum, lr=1e-6, dampening=0.0, nesterov=False, maximize=False,
                has_sparse_grad=False,
            )  # fmt: skip

    return step


def case(widths: tuple[int, ...], momentum: float, seconds: float) -> dict[str, Any]:
    """A model's step in every way, in milliseconds."""
    model = build(widths)
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, y = torch.randn(10, widths[0]), torch.randint(widths[-1], (10,))

    def gradients() -> None:
        for p in parameters:
            p.grad = None
        nn.functional.cross_entropy(model(x), y).backward()

    def with_step(step: Callable[..., Any]) -> Callable[[], None]:
        def both() -> None:
            gradients()
            step()

        return both

    ways: dict[str, Callable[..., Any]] = {
        "by hand": by_hand(parameters, momentum),
        "function": by_function(parameters, momentum),
        "class": torch.optim.SGD(parameters, 1e-6, momentum).step,
        "class, foreach": torch.optim.SGD(parameters, 1e-6, momentum, foreach=True).step,
        "AdamW": torch.optim.AdamW(parameters, 1e-6).step,
    }
    times = paired({name: with_step(step) for name, step in ways.items()}, seconds)
    hand = times["by hand"]
    return {
        "model": "-".join(map(str, widths)),
        "tensors": len(parameters),
        "momentum": momentum,
        "by_hand_us": 1e3 * statistics.median(hand),
        **{
            name: statistics.median(a / b for a, b in zip(times[name], hand, strict=True))
            for name in list(ways)[1:]
        },
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a case, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(widths, momentum) for widths in SHAPES for momentum in (0.0, 0.9)]
    rows = [case(*c, 0.2 if options.quick else 3.0) for c in cases[: 1 if options.quick else None]]
    columns = list(rows[0])[4:]
    lines = [
        [
            row["model"], str(row["tensors"]), f"{row['momentum']:g}", f"{row['by_hand_us']:.0f}",
            *(f"{row[name]:.2f}" for name in columns),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["model", "tensors", "momentum", "by hand, µs a step", *columns]
    text = table(header, lines) + (
        "\n\nA step is forward, backward and the optimizer's step. The last columns are the same "
        "step with torch's function, its class and its AdamW, in units of the one by hand."
    )
    if options.quick:
        print(text)
    else:
        write("client_step", "The optimizer's share of a client's step", text, rows, "cpu")


if __name__ == "__main__":
    main()
