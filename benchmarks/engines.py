"""One client after the other, or many side by side: which engine pays where.

    python benchmarks/engines.py

An MLP 784-200-10 whose first layer is FedPara of rank r, or dense; clients of 80 random examples,
batch 10, one epoch; one thread. Rounds of both engines in turn, medians of paired ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from peft import get_peft_model
from report import table, write
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig

ROUNDS = 9


def build(r: int | None) -> nn.Module:
    """The net."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
    if r is None:
        return model
    config = FedParaConfig(r=r, base_weight="replaced", target_modules=["0"])
    return get_peft_model(model, config)


def case(r: int | None, cohort: int) -> dict[str, Any]:
    """Both engines on the same work."""
    torch.manual_seed(0)
    data = [TensorDataset(torch.randn(80, 784), torch.randint(10, (80,))) for _ in range(cohort)]
    runs = {}
    for engine in ("sequential", "batched"):
        args = FederatedArguments(
            tempfile.mkdtemp(), per_client_batch_size=10, engine=engine, disable_tqdm=True
        )
        trainer = FederatedTrainer(build(r), args, data)
        runs[engine] = [trainer, trainer._start(None)[0]]
    ratios, sequential = [], []
    for number in range(ROUNDS + 1):
        seconds = {}
        for engine, run in runs.items():
            start = time.perf_counter()
            run[1], _ = run[0]._round(run[1])
            seconds[engine] = time.perf_counter() - start
        if number:  # the first round warms up
            ratios.append(seconds["batched"] / seconds["sequential"])
            sequential.append(seconds["sequential"])
    return {
        "model": "dense" if r is None else f"FedPara, r = {r}",
        "values": sum(p.numel() for p in build(r).parameters() if p.requires_grad),
        "cohort": cohort,
        "sequential_ms_per_client": 1e3 * statistics.median(sequential) / cohort,
        "batched_of_sequential": statistics.median(ratios),
        "chosen": "batched" if runs["batched"][0]._batched._values() <= 20_000 else "sequential",
    }


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = [case(r, cohort) for r in (4, 8, 16, None) for cohort in (10, 50)]
    lines = [
        [
            row["model"],
            f"{row['values']:,}",
            str(row["cohort"]),
            f"{row['sequential_ms_per_client']:.1f}",
            f"{row['batched_of_sequential']:.2f}",
            row["chosen"],
        ]
        for row in rows
    ]
    header = [
        "model", "trained values", "clients a round", "sequential, ms a client",
        "batched, of sequential", "chosen by engine='auto'",
    ]  # fmt: skip
    write("engines", "Sequential and batched engine", table(header, lines), rows)


if __name__ == "__main__":
    main()
