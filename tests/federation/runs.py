"""Runs in processes of their own: ``runs.py FOLDER STRATEGY PARAMETERIZATION ROUNDS [VARIANT]``.

Several are parted by ``--``. Each resumes if it can, and tells every round. It writes
``final.safetensors``: the global model, every client's own, and what its codec has lost so far and
its optimizer keeps.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState
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
    FederatedCallback,
    FederatedTrainer,
    FedParaConfig,
    FedProx,
    FedYogi,
    LocalOnly,
    Scaffold,
    Strategy,
    accuracy,
    partition,
)
from fedpara_peft.federation.strategies.base import advance


@dataclass(frozen=True)
class FedNova(Strategy):
    """Updates by their steps' weight: Δ = (Σ pᵢ τᵢ) Σ pᵢ Δᵢ / τᵢ (arXiv:2007.07481, eq. 6)."""

    sees_updates: ClassVar[bool] = True

    def server_step(self, server, mean):
        shares = list(zip(mean.weights, mean.updates, strict=True))
        effective = sum(p * u.steps.weight for p, u in shares)
        step = {
            n: effective * sum(p / u.steps.weight * u.update[n] for p, u in shares)
            for n in mean.update
        }
        return advance(server, step)


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
#: One of one's own, which sees single updates and how they were trained.
OWN = {"FedNova": FedNova()}
#: What else a run may be.
VARIANTS = {
    "codec": {
        "uplink_codec": "topk:0.2+int4", "downlink_codec": "int8", "error_feedback": True,
    },
    "one_block": {"factor_schedule": "one_block"},
    "FedPer": {"local_modules": ["5"]},
    "batched": {"engine": "batched"},
    # Runs are compared with each other: the noise's seed, secret and drawn anew for each, is given.
    "noise": {"clip_update_norm": 1.0, "dp_noise_multiplier": 0.1, "dp_noise_seed": 7},
    "seeded": {},
    "ranks": {"uplink_codec": "topk:0.2+int4", "error_feedback": True},
    "late": {
        "buffer_size": 2, "max_staleness": 3, "client_seconds_sigma": 0.4,
        "learning_rate": 0.03,  # stale updates and two momenta come to nothing at 0.1
        "uplink_codec": "topk:0.2+int4", "error_feedback": True,
    },
    "diverge": {"learning_rate": 1e30, "quorum": 0.5},
    "secure": {
        "secure_aggregation": True, "secure_clip": 0.5, "unmask_drop_out_probability": 0.1,
    },
    "keep": {
        "optim": "adamw", "learning_rate": 0.01, "optimizer_state": "keep", "momentum": 0.0,
        "factor_learning_rate": 0.02, "warmup_rounds": 2,
    },
}  # fmt: skip
PARAMETERIZATIONS = ("dense", "lowrank", "fedpara", "pfedpara")


class Tells(FederatedCallback):
    def __init__(self, tell):
        self.tell = tell

    def on_round_end(self, server, report):
        self.tell(report.round)


def main():
    for parted, given in itertools.groupby(sys.argv[1:], lambda word: word == "--"):
        if not parted:
            folder, strategy, parameterization, rounds, *variant = given
            run(folder, strategy, parameterization, int(rounds), *variant)


def run(folder, strategy, parameterization, rounds, variant=None, tell=print):
    changes = VARIANTS[variant] if variant else {}
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32),
        nn.ReLU(),
        # Clients cannot be stacked with dropout, or unless some have equally many examples.
        nn.Dropout(0.0 if variant == "batched" else 0.2),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )
    if parameterization != "dense":
        config = FedParaConfig(
            r=3,
            base_weight="seeded" if variant == "seeded" else "replaced",
            parameterization=parameterization,
            target_modules=["0", "3"],
        )
        model = get_peft_model(model, config)
    x = torch.randn(203, 16)
    data = TensorDataset(x, x[:, :4].argmax(1))
    if variant == "batched":
        clients = partition(data, "iid", 8)
    else:
        clients = partition(data, "quantity", 8, concentration=3.0)
    args = FederatedArguments(
        folder, num_rounds=rounds, clients_per_round=4, per_client_batch_size=8,
        eval_batch_size=32, save_every=3, save_total_limit=2, disable_tqdm=True,
        client_store="disk" if parameterization == "fedpara" else "auto",
        **{"momentum": 0.5, **changes},
    )  # fmt: skip
    trainer = FederatedTrainer(
        model, args, clients, data, compute_metrics=accuracy,
        strategy={**STRATEGIES, **OWN}[strategy], client_eval_dataset=clients,
        callbacks=[Tells(tell)],
        client_ranks=[1, 0.5, 3, 3, 2, 1, 1.0, 9] if variant == "ranks" else None,
        client_seconds=[1.0, 4.0] * 4 if variant == "late" else None,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    if not trainer.accelerator.is_main_process:
        return
    final = {f"global {k}": v.clone() for k, v in model.state_dict().items()}
    for i in range(8):
        personal = trainer.client_model(i)
        final |= {f"client {i} {k}": v.clone() for k, v in personal.state_dict().items()}
        kept = trainer.client_state(i)
        residual = kept.residual if kept else {}
        final |= {f"residual {i} {k}": v.clone() for k, v in residual.items()}
        for part, state in (kept.optimizer if kept else {}).items():
            final |= {f"optimizer {i} {part} {k}": v.clone() for k, v in state.items()}
    save_file(final, Path(folder) / "final.safetensors")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
