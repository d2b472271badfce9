"""Federated optimizers, one paper a file."""

from .adaptive import FedAdagrad, FedAdam, FedYogi
from .base import Strategy
from .fedavg import FedAvg
from .fedavgm import FedAvgM
from .fedprox import FedProx

__all__ = ["FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedProx", "FedYogi", "Strategy"]
