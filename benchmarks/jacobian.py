"""Cost of the Jacobian correction: a training step with it, of one without, in the same run.

python benchmarks/jacobian.py [--seconds 10]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import paired, ratio
from models import char_lstm, mlp, vgg16
from peft import get_peft_model
from report import table, write
from torch import nn

from fedpara_peft import FedParaConfig, composed_weights, jacobian_correction


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, correcting: bool) -> Callable[[], Any]:
    """Forward and backward."""

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def plain() -> None:
        model.zero_grad()
        loss().backward()

    def corrected() -> None:
        model.zero_grad()
        with composed_weights(model) as composed:
            value = loss()
            (value + jacobian_correction(value, composed, 0.1)).backward()

    return corrected if correcting else plain


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    labels = torch.randint(0, 10, (64,))
    sequence = torch.randint(0, 80, (64, 80))
    cases: list[tuple[str, Callable[[], nn.Module], Any, torch.Tensor, torch.Tensor]] = [
        ("MLP 784-256-10, batch 64", mlp, ["0"], torch.randn(64, 784), labels),
        ("LSTM 2x256, T 80, batch 64", char_lstm, ["lstm"], sequence, sequence),
        ("VGG16-GN, batch 64", vgg16, None, torch.randn(64, 3, 32, 32), labels),
    ]
    rows, lines = [], []
    for name, build, targets, x, y in cases:
        plain = build()
        if targets is None:
            targets = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)]
        config = FedParaConfig(gamma=0.1, base_weight="replaced", target_modules=targets)
        model = get_peft_model(plain, config)
        times = paired(
            {"without": step(model, x, y, False), "with": step(model, x, y, True)}, options.seconds
        )
        row = {"model": name, **{f"{k}_ms": statistics.median(v) for k, v in times.items()}}
        row["with/without"] = ratio(times, "with", "without")
        rows.append(row)
        lines.append(
            [
                name,
                f"{row['without_ms']:.1f}",
                f"{row['with_ms']:.1f}",
                f"{row['with/without']:.2f}",
            ]
        )
    text = table(["model, γ = 0.1", "without, ms", "with, ms", "ratio"], lines)
    write("jacobian", "Cost of the Jacobian correction in a training step", text, rows)


if __name__ == "__main__":
    main()
