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
from transformers import LlamaConfig, LlamaForCausalLM

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig

EXAMPLES, BATCH, WORDS = 80, 10, 512


def measure(session: Session, options: argparse.Namespace) -> None:
    """The nets at three sizes of the cohort, factorized and dense; adapters on the Llama."""
    nets, cohorts, ranks = ("Llama", "MLP", "CNN"), (50, 10, 100), (4, None, 16)
    if session.smoke:
        nets, cohorts, ranks = ("Llama", "MLP", "CNN"), (2,), (2,)
    session.each(
        ("clients", clients, {"net": net, "r": r, "cohort": cohort})
        for r in ranks
        for net in nets
        for cohort in cohorts
        if r is not None or net != "Llama"
    )


def built(net: str, r: int | None, small: bool = False) -> nn.Module:
    """MLP 784-200-10, two convolutions and a dense layer on 28 x 28 pixels, or a Llama 6 x 512."""
    torch.manual_seed(0)
    if net == "Llama":
        layers, width = (1, 32) if small else (6, 512)
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
            intermediate_size=3 * width,
        )  # fmt: skip
        base = LlamaForCausalLM(config)
        return get_peft_model(base, FedParaConfig(r=r, target_modules=["q_proj", "v_proj"]))
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


def examples(net: str) -> Any:
    """A client's: 80 vectors or images, or 20 lines of 64 tokens."""
    if net == "Llama":
        ids = torch.randint(WORDS, (EXAMPLES // 4, 64))
        return [{"input_ids": row, "labels": row} for row in ids]
    size = (784,) if net == "MLP" else (1, 28, 28)
    return TensorDataset(torch.randn(EXAMPLES, *size), torch.randint(10, (EXAMPLES,)))


def clients(session: Session, net: str, r: int | None, cohort: int) -> dict[str, Any]:
    """Rounds of both engines in turn: milliseconds a client."""
    data = [examples(net) for _ in range(cohort)]
    rounds, repeats = (2, 1) if session.smoke else (4, 2)

    def trainer(engine: str) -> FederatedTrainer:
        args = FederatedArguments(
            tempfile.mkdtemp(), num_rounds=rounds, per_client_batch_size=BATCH, engine=engine,
            learning_rate=1e-3,
            disable_tqdm=True,
        )  # fmt: skip
        return FederatedTrainer(built(net, r, session.smoke), args, data)

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
