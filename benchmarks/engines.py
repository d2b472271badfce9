"""One client after the other, or many side by side: which engine pays where.

    python benchmarks/engines.py [--quick] [--device cuda]

An MLP 784-200-10 whose first layer is FedPara of rank r, or dense; clients of 80 random examples,
batch 10, one epoch; one thread. Runs of both engines in turn, medians of paired rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from typing import Any

import torch
from peft import get_peft_model
from report import ask_device, table, write
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig

ROUNDS, REPEATS = 5, 3


def build(r: int | None) -> nn.Module:
    """The net."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
    if r is None:
        return model
    config = FedParaConfig(r=r, base_weight="replaced", target_modules=["0"])
    return get_peft_model(model, config)


def case(r: int | None, cohort: int, rounds: int) -> dict[str, Any]:
    """Both engines on the same work."""
    torch.manual_seed(0)
    data = [TensorDataset(torch.randn(80, 784), torch.randint(10, (80,))) for _ in range(cohort)]

    def trainer(engine: str) -> FederatedTrainer:
        args = FederatedArguments(
            tempfile.mkdtemp(), num_rounds=rounds + 1, per_client_batch_size=10, engine=engine,
            disable_tqdm=True,
        )  # fmt: skip
        return FederatedTrainer(build(r), args, data)

    ratios, sequential = [], []
    for _ in range(REPEATS):
        runs = [trainer(engine).train() for engine in ("sequential", "batched")]
        pairs = list(zip(*([report.seconds for report in run] for run in runs), strict=True))
        for alone, stacked in pairs[1:]:  # the first round warms up
            ratios.append(stacked / alone)
            sequential.append(alone)
    automatic = trainer("auto")._simulation.stacked
    return {
        "model": "dense" if r is None else f"FedPara, r = {r}",
        "values": sum(p.numel() for p in build(r).parameters() if p.requires_grad),
        "cohort": cohort,
        "sequential_ms_per_client": 1e3 * statistics.median(sequential) / cohort,
        "batched_of_sequential": statistics.median(ratios),
        "chosen": "batched" if automatic and automatic.wanted(cohort) else "sequential",
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two cases, nothing written")
    ask_device(parser)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    cases = [(r, cohort) for r in (4, 8, 16, None) for cohort in (10, 50)]
    if options.quick:
        rows = [case(*cases[i], 2) for i in (0, -2)]
    else:
        rows = [case(*each, ROUNDS) for each in cases]
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
    if options.quick:
        print(table(header, lines))
    else:
        title = "Sequential and batched engine"
        write("engines", title, table(header, lines), rows, options.device)


if __name__ == "__main__":
    main()
