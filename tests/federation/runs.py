"""A small run in a process of its own: ``runs.py FOLDER STRATEGY PARAMETERIZATION ROUNDS``.

Resumes if it can. Writes ``final.safetensors``: the global model and every client's own.
"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FederatedArguments,
    FederatedTrainer,
    FedParaConfig,
    FedProx,
    FedYogi,
    LocalOnly,
    Scaffold,
    accuracy,
    partition,
)

STRATEGIES = {
    "FedAvg": FedAvg(),
    "FedAvgM": FedAvgM(),
    "FedProx": FedProx(0.1),
    "Scaffold": Scaffold(),
    "FedDyn": FedDyn(),
    "FedAdam": FedAdam(),
    "FedYogi": FedYogi(),
    "FedAdagrad": FedAdagrad(),
    "LocalOnly": LocalOnly(),
}
PARAMETERIZATIONS = ("dense", "lowrank", "fedpara", "pfedpara")


def main():
    folder, strategy, parameterization, rounds, *more = sys.argv[1:]
    run(folder, strategy, parameterization, int(rounds), 1e30 if "--diverge" in more else 0.1)


def run(folder, strategy, parameterization, rounds, learning_rate=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )
    if parameterization != "dense":
        config = FedParaConfig(
            r=3,
            base_weight="replaced",
            parameterization=parameterization,
            target_modules=["0", "3"],
        )
        model = get_peft_model(model, config)
    x = torch.randn(203, 16)
    data = TensorDataset(x, x[:, :4].argmax(1))
    clients = partition(data, "quantity", 8, concentration=3.0)
    args = FederatedArguments(
        folder, num_rounds=rounds, clients_per_round=4, per_client_batch_size=8,
        eval_batch_size=32, learning_rate=learning_rate,
        save_every=3, save_total_limit=2, momentum=0.5, disable_tqdm=True,
        client_store="disk" if parameterization == "fedpara" else "auto",
    )  # fmt: skip
    trainer = FederatedTrainer(
        model, args, clients, data, compute_metrics=accuracy, strategy=STRATEGIES[strategy],
        client_eval_dataset=clients,
    )  # fmt: skip
    if trainer.accelerator.is_main_process:
        print("training", flush=True)
    trainer.train(resume_from_checkpoint=True)
    if not trainer.accelerator.is_main_process:
        return
    final = {f"global {k}": v.clone() for k, v in model.state_dict().items()}
    for i in range(8):
        personal = trainer.client_model(i)
        final |= {f"client {i} {k}": v.clone() for k, v in personal.state_dict().items()}
    save_file(final, Path(folder) / "final.safetensors")


if __name__ == "__main__":
    main()
