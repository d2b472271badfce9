"""The task that server, clients and the simulation share.

Handwritten digits (8x8 pixels, ten classes) that scikit-learn carries, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fedpara_peft import FederatedArguments, FedParaConfig, partition

NUM_CLIENTS = 3


def model_fn() -> PeftModel:
    """A net whose wide layer is half shared, half each client's own; the same in every process."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    config = FedParaConfig(
        gamma=0.1, base_weight="replaced", parameterization="pfedpara", target_modules=["0"]
    )
    return get_peft_model(net, config)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set."""
    found = load_digits()
    inputs, labels = torch.tensor(found.data / 16).float(), torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1350], order[1350:]
    return TensorDataset(inputs[train], labels[train]), TensorDataset(inputs[test], labels[test])


def clients() -> list[Subset]:
    """The training sets of all clients, skewed by class."""
    return list(partition(digits()[0], "dirichlet", NUM_CLIENTS, concentration=0.5))


def data_fn(client: int) -> Dataset:
    """A client's training set; a real node would read its own."""
    return clients()[client]


def test_set() -> Dataset:
    """What the server tests the global model on."""
    return digits()[1]


def arguments(run_config: Mapping[str, Any]) -> FederatedArguments:
    """The run's settings, the same for server and clients."""
    return FederatedArguments(
        str(run_config["output-dir"]),
        num_rounds=int(run_config["num-rounds"]),
        num_local_epochs=2,
        learning_rate=0.2,
        max_grad_norm=2.0,
        uplink_codec="int8",
        error_feedback=True,
        quorum=0.5,
        save_every=5,
        disable_tqdm=True,
    )
