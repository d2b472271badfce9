"""The task that server, sites and the simulation share; shipped with the job.

Handwritten digits (8x8 pixels, ten classes) that scikit-learn carries, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fedpara_peft import FederatedArguments, FedParaConfig, accuracy, partition
from fedpara_peft.integrations.nvflare import NodeSetup, ServerSetup

SITES = ["hospital-a", "hospital-b", "hospital-c"]  # client i is the i-th


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
    return list(partition(digits()[0], "dirichlet", len(SITES), concentration=0.5))


def data_fn(client: int) -> Dataset:
    """A client's training set; a real site would read its own."""
    return clients()[client]


def test_set() -> Dataset:
    """What the server tests the global model on."""
    return digits()[1]


def arguments(config: Mapping[str, Any]) -> FederatedArguments:
    """The run's settings, the same for server and sites."""
    return FederatedArguments(
        str(Path(config["folder"]) / "server"),
        num_rounds=int(config["num_rounds"]),
        num_local_epochs=2,
        learning_rate=0.2,
        max_grad_norm=2.0,
        uplink_codec="int8",
        error_feedback=True,
        save_every=5,
        disable_tqdm=True,
    )


def server(config: Mapping[str, Any]) -> ServerSetup:
    """What the server brings along."""
    return ServerSetup(
        model_fn,
        arguments(config),
        len(SITES),
        eval_data_fn=test_set,
        compute_metrics=accuracy,
        deadline_s=600.0,
    )


def node(config: Mapping[str, Any]) -> NodeSetup:
    """What a site brings along; its clients' local halves lie in a folder that it never sends."""
    return NodeSetup(model_fn, data_fn, arguments(config), str(Path(config["folder"]) / "sites"))
