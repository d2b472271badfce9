"""Federated optimizers, one paper a file."""

from ..state import LocalSteps
from .adaptive import FedAdagrad, FedAdam, FedYogi
from .base import Correction, Strategy
from .fedavg import FedAvg
from .fedavgm import FedAvgM
from .feddyn import FedDyn
from .fedprox import FedProx
from .local_only import LocalOnly
from .named import STRATEGIES, as_strategy
from .objective import Objective, has_own_loss
from .scaffold import Scaffold

__all__ = [
    "STRATEGIES",
    "Correction",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedDyn",
    "FedProx",
    "FedYogi",
    "LocalOnly",
    "LocalSteps",
    "Objective",
    "Scaffold",
    "Strategy",
    "as_strategy",
    "has_own_loss",
]
