"""Strategies by name."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentsError
from .adaptive import FedAdagrad, FedAdam, FedYogi
from .base import Strategy
from .fedavg import FedAvg
from .fedavgm import FedAvgM
from .feddyn import FedDyn
from .fedprox import FedProx
from .local_only import LocalOnly
from .scaffold import Scaffold

_ALL: tuple[type[Strategy], ...] = (
    FedAvg, FedAvgM, FedProx, Scaffold, FedDyn, FedAdam, FedYogi, FedAdagrad, LocalOnly,
)  # fmt: skip
STRATEGIES = {strategy.__name__: strategy for strategy in _ALL}


def as_strategy(given: Any) -> Strategy:
    """A strategy from itself, its class, its name in any case, or None (FedAvg).

    Raises:
        ArgumentsError: it is none of these.
    """
    if given is None:
        return FedAvg()
    if isinstance(given, Strategy):
        return given
    if isinstance(given, type) and issubclass(given, Strategy):
        return given()
    if isinstance(given, str):
        wanted = given.lower().replace("_", "").replace("-", "")
        for name, strategy in STRATEGIES.items():
            if name.lower() == wanted:
                return strategy()
    raise ArgumentsError(
        f"strategy is {given!r:.80}: give a Strategy such as FedAvg(), or one of the names "
        f"{', '.join(STRATEGIES)}"
    )
