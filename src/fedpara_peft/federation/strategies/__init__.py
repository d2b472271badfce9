"""Federated optimizers, one paper a file."""

from .base import Strategy
from .fedavg import FedAvg

__all__ = ["FedAvg", "Strategy"]
