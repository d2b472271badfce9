"""A user's program, type-checked from outside; see test_typing.py. Never run."""

from collections.abc import Mapping
from typing import assert_type

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fedpara_peft import (
    Codec,
    FedAvgM,
    FederatedArguments,
    FederatedTrainer,
    FedParaConfig,
    History,
    Plan,
    Strategy,
    accuracy,
    communicated_state,
    fedpara_summary,
    partition,
    plan,
    rank_for_gamma,
    save_local,
)


class Mine(Strategy):
    """A strategy that changes nothing."""


def train(model: torch.nn.Module, codec: Codec) -> float:
    data = TensorDataset(torch.rand(40, 8), torch.randint(0, 2, (40,)))
    args = FederatedArguments("run", num_rounds=2, uplink_codec=codec, learning_rate=0.1)
    clients = partition(data, "dirichlet", num_clients=4, concentration=0.5)
    trainer = FederatedTrainer(
        model, args, clients, eval_dataset=data, compute_metrics=accuracy, strategy=FedAvgM()
    )
    assert_type(plan(model, args, 4, Mine()), Plan)
    history = trainer.train()
    assert_type(history, History)
    save_local(trainer.client_model(0), "mine")
    state: Mapping[str, Tensor] = communicated_state(model)
    print(fedpara_summary(model), len(state))
    assert_type(rank_for_gamma(0.1, 64, 64), int)
    assert_type(history.total_bytes, int)
    return history[-1].metrics["eval_accuracy"]


FedParaConfig(r=4, target_modules=["q_proj"], base_weight="frozen")
# Each of these is wrong, and must be known to be: an ignore without an error is one.
FedParaConfig(r="four")  # type: ignore[arg-type]
FederatedArguments("run", num_rounds="many")  # type: ignore[arg-type]
rank_for_gamma("0.1", 64, 64)  # type: ignore[arg-type]
FederatedTrainer(torch.nn.Linear(2, 2))  # type: ignore[call-arg]
