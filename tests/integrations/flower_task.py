"""The run that the tests of the Flower integration share; nodes' workers import it, too."""

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import FederatedArguments, FedParaConfig, partition

CLIENTS = 3


def model_fn(base_weight="replaced"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip
    config = FedParaConfig(
        r=3, base_weight=base_weight, parameterization="pfedpara", target_modules=["0", "4"]
    )
    return get_peft_model(model, config)


def data():
    x = torch.randn(90, 16, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :4].argmax(1))


def clients():
    return partition(data(), "quantity", CLIENTS, concentration=3.0)


def data_fn(client):
    return clients()[client]


def arguments(folder, **more):
    settings = {
        "num_rounds": 4, "per_client_batch_size": 8, "learning_rate": 0.1, "momentum": 0.5,
        "eval_every": 2, "disable_tqdm": True,
    }  # fmt: skip
    return FederatedArguments(str(folder), **{**settings, **more})


def wide_model_fn(r=1):
    """Its second layer's factors are far less than its weight, all of them global."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 60), nn.BatchNorm1d(60), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 4),
    )  # fmt: skip
    config = FedParaConfig(r=r, base_weight="replaced", target_modules=["4"])
    return get_peft_model(model, config)
