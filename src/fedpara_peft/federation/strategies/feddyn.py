"""FedDyn (Acar et al., arXiv:2111.04263)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...comm.state import State
from ..arguments import FederatedArguments
from ..state import Broadcast, CohortMean, LocalSteps, ServerState
from .base import Correction, Kept, Strategy, advance, moment, uneven_means


@dataclass(frozen=True)
class FedDyn(Strategy):
    """Align the clients' optima with the server's by a dynamic regularizer (Algorithm 1).

        min_w F_i(w) - ⟨λ_i, w⟩ + (α/2) ‖w - w_t‖²,   λ_i ← λ_i - α (w_i - w_t)
        h ← h - α (|S| / N) mean Δ,   w_{t+1} = w_t + mean Δ - h / α

    λ_i stays on its client, h on the server: the traffic is FedAvg's. h is the mean of all λ_i as
    long as both take Δ_i as the server received it, every client counts alike, and nothing is added
    to the mean.

    Attributes:
        dyn_alpha: α.
    """

    dyn_alpha: float = 0.1
    weighting: ClassVar[Literal["num_examples", "uniform"]] = "uniform"
    sums_gradients: ClassVar[bool] = True

    def obstacle(self, args: FederatedArguments) -> str | None:
        """Whatever would part h from the mean of all λ_i."""
        if args.dp_noise_multiplier:
            return "dp_noise_multiplier: the server would sum up noise that no λ_i knows of"
        return uneven_means(args)

    def correction(self, broadcast: Broadcast, kept: Kept) -> Correction | None:
        """Add α (w - w_t) - λ_i."""
        offset = {n: -dual for n, dual in kept.get("dual", {}).items()}
        return Correction(pull=self.dyn_alpha, offset=offset)

    def next_kept(
        self, broadcast: Broadcast, kept: Kept, update: State, extra: Kept, steps: LocalSteps
    ) -> Kept:
        """Keep the client's λ_i."""
        own = kept.get("dual", {})
        change = {n: -self.dyn_alpha * d for n, d in update.items()}
        return {"dual": {n: own[n] + d if n in own else d for n, d in change.items()}}

    def server_step(self, server: ServerState, mean: CohortMean) -> ServerState:
        """Move h, and the weights against it."""
        factor = self.dyn_alpha * mean.share
        h = {n: h - factor * mean.update[n] for n, h in moment(server, "h").items()}
        step = {n: mean.update[n] - h[n] / self.dyn_alpha for n in h}
        return advance(server, step, {"h": h})
