"""FedAvgM: server momentum (Hsu et al., arXiv:1909.06335)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..state import CohortMean, ServerState
from .base import Strategy, advance, moment


@dataclass(frozen=True)
class FedAvgM(Strategy):
    """FedAvg with momentum on the server.

        v ← β v + Δ,   w_{t+1} = w_t + η v

    Attributes:
        server_momentum: β.
        server_learning_rate: η.
    """

    server_momentum: float = 0.9
    server_learning_rate: float = 1.0
    ranks_may_differ: ClassVar[bool] = True
    updates_may_be_late: ClassVar[bool] = True

    def server_step(self, server: ServerState, mean: CohortMean) -> ServerState:
        """Move along the momentum of mean updates."""
        velocity = {
            name: self.server_momentum * v + mean.update[name]
            for name, v in moment(server, "velocity").items()
        }
        step = {name: self.server_learning_rate * v for name, v in velocity.items()}
        return advance(server, step, {"velocity": velocity})
