"""FedPara against the low-rank baseline of equal size on the demo's data, several seeds.

    python benchmarks/digits_equal_size.py

Real digits, 20 clients, Dirichlet 0.5, 5 clients a round, 30 rounds of 2 epochs, batch 16, gradient
norm clipped at 2. Each method's learning rate is the best of the same grid by mean accuracy over
two seeds that the table does not use.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from report import table, write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from digits import DigitsNet, load_data

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig, accuracy, partition

GRID = (0.1, 0.2, 0.4, 0.8)
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
RANKS = (2, 4, 8)


def build(method: str, r: int | None, seed: int) -> torch.nn.Module:
    """The net with its hidden layer dense, FedPara of rank r, or low-rank of rank 2r."""
    torch.manual_seed(seed)
    model = DigitsNet()
    if method == "dense":
        return model
    assert r is not None
    config = FedParaConfig(
        r=r if method == "fedpara" else 2 * r,
        parameterization=method,
        base_weight="replaced",
        target_modules=["hidden"],
    )
    return get_peft_model(model, config)


def run(method: str, r: int | None, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train once."""
    train, test = load_data()
    model = build(method, r, seed)
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedArguments(
            output_dir=folder, num_rounds=30, clients_per_round=5, num_local_epochs=2,
            per_client_batch_size=16, learning_rate=learning_rate, max_grad_norm=2.0, seed=seed,
            eval_every=5, disable_tqdm=True,
        )  # fmt: skip
        clients = partition(train, "dirichlet", 20, seed, concentration=0.5)
        trainer = FederatedTrainer(model, args, clients, test, compute_metrics=accuracy)
        history = trainer.train()
    return {
        "method": method,
        "r": r,
        "learning_rate": learning_rate,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "megabytes": history.total_bytes / 1e6,
        "accuracy": history[-1].metrics["eval_accuracy"],
    }


def main() -> None:
    """Tune, measure, write."""
    rows, lines = [], []
    cases = [("dense", None)] + [(m, r) for r in RANKS for m in ("lowrank", "fedpara")]
    for method, r in cases:
        means = {
            rate: statistics.mean(run(method, r, rate, s)["accuracy"] for s in TUNING_SEEDS)
            for rate in GRID
        }
        best = max(means, key=lambda rate: means[rate])
        results = [run(method, r, best, seed) for seed in SEEDS]
        rows += results
        values = [100 * result["accuracy"] for result in results]
        lines.append(
            [
                method if r is None else f"{method}, rank {r if method == 'fedpara' else 2 * r}",
                f"{results[0]['parameters']:,}",
                f"{results[0]['megabytes']:.1f}",
                f"{best}",
                f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}",
                f"{min(values):.1f}",
            ]
        )
        print(lines[-1], flush=True)
    header = ["model", "parameters", "MB sent", "learning rate", "accuracy, %", "worst seed"]
    write(
        "digits_equal_size",
        "FedPara and low-rank of equal size on digits",
        table(header, lines),
        rows,
    )


if __name__ == "__main__":
    main()
