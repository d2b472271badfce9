"""Ten thousand clients with a state each, on disk and in memory: the process must stay small.

    python benchmarks/many_clients.py

pFedPara with SCAFFOLD, so that every client keeps its half of the weights and a control variate;
100 clients a round, a checkpoint every 20 rounds. The process's resident memory is read after every
round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from report import table, write
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fedpara_peft import (
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedParaConfig,
    Scaffold,
)

CLIENTS, ROUNDS, EXAMPLES = 10_000, 100, 10


class Clients(Sequence[Any]):
    """Ten rows of a shared table a client, found when asked for."""

    def __init__(self) -> None:
        x = torch.randn(20_000, 128)
        self.data = TensorDataset(x, x[:, :10].argmax(1))

    def __len__(self) -> int:
        return CLIENTS

    def __getitem__(self, client: int) -> Subset:
        if client >= CLIENTS:
            raise IndexError(client)
        start = client * EXAMPLES % len(self.data)
        return Subset(self.data, range(start, start + EXAMPLES))


class Memory(FederatedCallback):
    """Resident memory after every round, and its time."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []
        self.seconds: list[float] = []

    def on_round_end(self, server: Any, report: Any) -> None:
        """Read it."""
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        self.megabytes.append(int(line.split()[1]) / 1e3)
        self.seconds.append(report.seconds)


def run(store: str) -> dict[str, Any]:
    """One run."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 10)),
        FedParaConfig(
            r=16, parameterization="pfedpara", base_weight="replaced", target_modules=["0"]
        ),
    )
    watch = Memory()
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedArguments(
            folder, num_rounds=ROUNDS, clients_per_round=100, per_client_batch_size=10,
            client_store=store, save_every=20, save_total_limit=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = FederatedTrainer(model, args, Clients(), strategy=Scaffold(), callbacks=[watch])
        trainer.train()
        files = list((Path(folder) / "clients").iterdir())
        on_disk = sum(path.stat().st_size for path in files)
    return {
        "store": store,
        "clients_with_state": len({path.name.split(".")[0] for path in files}),
        "files": len(files),
        "disk_megabytes": on_disk / 1e6,
        "resident_megabytes": watch.megabytes,
        "round_seconds": watch.seconds,
    }


def main() -> None:
    """Run both stores, disk first, in one process."""
    torch.set_num_threads(1)
    rows = [run("disk"), run("memory")]
    marks = [10, 20, 50, ROUNDS]
    lines = []
    for row in rows:
        seconds = sorted(row["round_seconds"])
        lines.append(
            [
                row["store"],
                *(f"{row['resident_megabytes'][mark - 1]:,.0f}" for mark in marks),
                f"{1e3 * seconds[len(seconds) // 2]:,.0f}",
                f"{row['clients_with_state']:,}",
                f"{row['disk_megabytes']:,.0f}",
            ]
        )
    header = [
        "clients' states", *(f"MB resident, round {mark}" for mark in marks),
        "ms a round of 100 clients", "clients with a state", "MB on disk",
    ]  # fmt: skip
    write("many_clients", "Ten thousand clients", table(header, lines), rows)


if __name__ == "__main__":
    main()
