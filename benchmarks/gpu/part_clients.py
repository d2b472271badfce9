"""Clients one after the other, and side by side, on this device."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from peft import get_peft_model
from session import Session
from timing import spread
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig

EXAMPLES, BATCH = 80, 10


def measure(session: Session, options: argparse.Namespace) -> None:
    """Both nets at three sizes of the cohort, factorized and dense."""
    nets, cohorts, ranks = ("MLP", "CNN"), (50, 10, 100), (4, None, 16)
    if session.smoke:
        nets, cohorts, ranks = ("MLP", "CNN"), (2,), (2,)
    session.each(
        ("clients", clients, {"net": net, "r": r, "cohort": cohort})
        for r in ranks
        for net in nets
        for cohort in cohorts
    )


def built(net: str, r: int | None) -> nn.Module:
    """MLP 784-200-10, or two convolutions and a dense layer on 28 x 28 pixels."""
    torch.manual_seed(0)
    if net == "MLP":
        model = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
        targets = ["0"]
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 49, 10),
        )  # fmt: skip
        targets = ["3"]
    if r is None:
        return model
    return get_peft_model(model, FedParaConfig(r=r, base_weight="replaced", target_modules=targets))


def clients(session: Session, net: str, r: int | None, cohort: int) -> dict[str, Any]:
    """Rounds of both engines in turn: milliseconds a client."""
    size = (784,) if net == "MLP" else (1, 28, 28)
    data = [
        TensorDataset(torch.randn(EXAMPLES, *size), torch.randint(10, (EXAMPLES,)))
        for _ in range(cohort)
    ]
    rounds, repeats = (2, 1) if session.smoke else (4, 2)

    def trainer(engine: str) -> FederatedTrainer:
        args = FederatedArguments(
            tempfile.mkdtemp(), num_rounds=rounds, per_client_batch_size=BATCH, engine=engine,
            learning_rate=1e-3,
            disable_tqdm=True,
        )  # fmt: skip
        return FederatedTrainer(built(net, r), args, data)

    times: dict[str, list[float]] = {"sequential": [], "batched": []}
    for _ in range(repeats):
        for engine in times:
            reports = trainer(engine).train()
            # The first round warms up; a round ends with its update in main memory.
            times[engine] += [1e3 * report.seconds / cohort for report in reports][1:]
    automatic = trainer("auto")._simulation.stacked
    return {
        "ms": {engine: spread(values) for engine, values in times.items()},
        "of": {
            "sequential": spread(
                [a / b for a, b in zip(times["batched"], times["sequential"], strict=True)]
            )
        },
        "blocks": len(times["batched"]),
        "values": sum(p.numel() for p in built(net, r).parameters() if p.requires_grad),
        "takes": "batched" if automatic and automatic.wanted(cohort) else "sequential",
    }
