"""SCAFFOLD (Karimireddy et al., arXiv:1910.06378)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...comm.state import State
from ..arguments import FederatedArguments
from ..errors import ArgumentsError
from ..state import Broadcast, CohortMean, LocalSteps, ServerState
from .base import Correction, Kept, Strategy, advance, moment, uneven_means

_KEPT = (
    "momentum and optimizer_state='keep' together: what is kept is of earlier rounds' gradients, "
    "so c_i would be no mean of this round's"
)


@dataclass(frozen=True)
class Scaffold(Strategy):
    """Correct the clients' drift with control variates (Algorithm 1, option II).

        y ← y - η (g - c_i + c),   c_i⁺ = c_i - c + (w_t - y) / (η Σ_k a_k)
        w_{t+1} = w_t + η_g mean Δ,   c ← c + (|S| / N) mean(c_i⁺ - c_i)

    Control variates of the server travel down, their changes travel up: twice FedAvg's traffic. a_k
    is what step k's gradient weighs in all (see :class:`LocalSteps`): 1 in the paper, whose clients
    have no momentum, so that the sum is K. c_i⁺ is a mean of the client's gradients either way, and
    c the mean of all c_i, because both take the change as the server received it.

    Attributes:
        server_learning_rate: η_g.
    """

    server_learning_rate: float = 1.0
    weighting: ClassVar[Literal["num_examples", "uniform"]] = "uniform"
    sums_gradients: ClassVar[bool] = True

    downlink: ClassVar[tuple[str, ...]] = ("control",)
    uplink: ClassVar[tuple[str, ...]] = ("control",)

    def obstacle(self, args: FederatedArguments) -> str | None:
        """Whatever would part c from the mean of all c_i, or c_i from a mean of gradients."""
        if args.weight_decay and args.max_grad_norm is not None:
            return (
                "weight_decay and max_grad_norm together: the decay is not clipped, so a step is "
                "no multiple of one gradient"
            )
        if args.momentum and args.optimizer_state == "keep":
            return _KEPT
        return uneven_means(args)

    def broadcast(self, server: ServerState) -> Kept:
        """Send c along."""
        return {"control": moment(server, "control")}

    def correction(self, broadcast: Broadcast, kept: Kept) -> Correction | None:
        """Add c - c_i."""
        control, own = broadcast.extra["control"], kept.get("control", {})
        return Correction(offset={n: c - own[n] if n in own else c for n, c in control.items()})

    def client_extra(
        self, broadcast: Broadcast, kept: Kept, update: State, steps: LocalSteps
    ) -> Kept:
        """Send c_i⁺ - c_i."""
        if steps.weight is None:
            raise ArgumentsError(
                "Scaffold needs to know what the local optimizer makes of a gradient: use SGD, "
                "with weight decay as you like, and momentum with optimizer_state='reset'"
            )
        scale = -1 / (steps.weight * steps.learning_rate)
        control = broadcast.extra["control"]
        return {"control": {n: scale * update[n] - c for n, c in control.items()}}

    def next_kept(
        self, broadcast: Broadcast, kept: Kept, update: State, extra: Kept, steps: LocalSteps
    ) -> Kept:
        """Keep c_i, moved as the server's c is."""
        own, change = kept.get("control", {}), extra["control"]
        return {"control": {n: own[n] + d if n in own else d for n, d in change.items()}}

    def server_step(self, server: ServerState, mean: CohortMean) -> ServerState:
        """Move the weights and the server's control."""
        change = mean.extra["control"]
        control = {n: c + mean.share * change[n] for n, c in moment(server, "control").items()}
        step = {n: self.server_learning_rate * mean.update[n] for n in control}
        return advance(server, step, {"control": control})
