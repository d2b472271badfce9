"""The run that the tests of secure aggregation on nodes share; nodes' workers import it, too."""

import torch
from peft import get_peft_model
from tests.integrations import flower_task
from torch import nn

from fedpara_peft import FedParaConfig, partition

CLIENTS = 4
SECURE = {"secure_aggregation": True, "secure_clip": 0.25}


def model_fn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 4))
    config = FedParaConfig(r=2, parameterization="pfedpara", target_modules=["0"])
    return get_peft_model(net, config)


def data_fn(client):
    return clients()[client]


def clients():
    return partition(flower_task.data(), "quantity", CLIENTS, concentration=3.0)


def arguments(folder, **more):
    return flower_task.arguments(folder, **{"num_rounds": 2, **SECURE, **more})
