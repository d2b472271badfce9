"""SCAFFOLD (Karimireddy et al., arXiv:1910.06378)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...comm.state import State
from ..state import Broadcast, CohortMean, ServerState
from .base import Correction, Kept, LocalSteps, Strategy, advance, moment


@dataclass(frozen=True)
class Scaffold(Strategy):
    """Correct the clients' drift with control variates (Algorithm 1, option II).

        y ← y - η (g - c_i + c),   c_i⁺ = c_i - c + (w_t - y) / (K η)
        w_{t+1} = w_t + η_g mean Δ,   c ← c + (|S| / N) mean(c_i⁺ - c_i)

    Control variates of the server travel down, their changes travel up: twice FedAvg's traffic.

    Attributes:
        server_learning_rate: η_g.
    """

    server_learning_rate: float = 1.0
    weighting: ClassVar[Literal["num_examples", "uniform"]] = "uniform"

    def broadcast(self, server: ServerState) -> Kept:
        """Send c along."""
        return {"control": moment(server, "control")}

    def correction(self, broadcast: Broadcast, kept: Kept) -> Correction | None:
        """Add c - c_i."""
        control, own = broadcast.extra["control"], kept.get("control", {})
        return Correction(offset={n: c - own[n] if n in own else c for n, c in control.items()})

    def next_client_state(
        self, broadcast: Broadcast, kept: Kept, update: State, steps: LocalSteps
    ) -> tuple[Kept, Kept]:
        """Keep c_i⁺ and send c_i⁺ - c_i."""
        scale = -1 / (steps.count * steps.learning_rate)
        own = kept.get("control", {})
        change = {n: scale * update[n] - c for n, c in broadcast.extra["control"].items()}
        return (
            {"control": {n: own[n] + d if n in own else d for n, d in change.items()}},
            {"control": change},
        )

    def server_step(self, server: ServerState, mean: CohortMean) -> ServerState:
        """Move the weights and the server's control."""
        change = mean.extra["control"]
        control = {n: c + mean.share * change[n] for n, c in moment(server, "control").items()}
        step = {n: self.server_learning_rate * mean.update[n] for n in control}
        return advance(server, {**mean.update, **step}, {"control": control})
