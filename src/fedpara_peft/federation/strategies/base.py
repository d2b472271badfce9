"""What a strategy may do differently from the plain round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ...comm.state import State
from ...maths.precision import as_real, from_real
from ..arguments import FederatedArguments
from ..data.loss import Loss
from ..state import Broadcast, CohortMean, LocalSteps, ServerState

#: Groups of states by name.
Kept = Mapping[str, State]


@dataclass(frozen=True)
class Correction:
    """What a strategy adds to a client's gradient at every local step (before it is clipped).

        g ← g + μ (w - w_t) + d

    Attributes:
        pull: μ.
        offset: d, fixed during the client's turn; names it lacks have none.
    """

    pull: float = 0.0
    offset: State | None = None


class Strategy:
    """A federated optimizer. A subclass overrides only what its paper changes.

    Strategies hold settings, never state: what must survive a round is in :class:`ServerState`, or
    in the client's own state. All states are keyed by the names of the communicated parameters.
    Buffers (running means of norm layers) are no strategy's business: they take their mean.
    """

    #: Weights of the cohort's mean: by the clients' examples, or all alike.
    weighting: ClassVar[Literal["num_examples", "uniform"]] = "num_examples"
    #: Whether anything travels at all.
    communicates: ClassVar[bool] = True
    #: Whether its algebra needs clients whose steps are a sum of their gradients: plain SGD.
    sums_gradients: ClassVar[bool] = False
    #: Groups that travel down beside w_t, and up beside the update. Each group has the names,
    #: shapes and dtypes of the parameters that train in the round.
    downlink: ClassVar[tuple[str, ...]] = ()
    uplink: ClassVar[tuple[str, ...]] = ()
    #: Whether :meth:`server_step` is given the single updates beside their mean. The server then
    #: holds them all until the round closes, and noise on the mean would protect none of them.
    sees_updates: ClassVar[bool] = False
    #: Whether its algebra holds entry by entry where clients lack entries: those of a lower rank
    #: have no update of them, and none counts in their mean. Sums over clients do not.
    ranks_may_differ: ClassVar[bool] = False
    #: Whether its algebra holds for updates that are older than the server, and scaled by their age
    #: (with their groups of ``uplink``). What a client and the server move together may part.
    updates_may_be_late: ClassVar[bool] = False

    def obstacle(self, args: FederatedArguments) -> str | None:
        """Which of these settings the strategy's algebra does not allow; None if all are fine."""
        return None

    def broadcast(self, server: ServerState) -> Kept:
        """The groups of ``downlink``."""
        return {}

    def correction(self, broadcast: Broadcast, kept: Kept) -> Correction | None:
        """Correct a client's gradients; ``kept`` is what the strategy keeps for this client."""
        return None

    def local_loss(
        self,
        model: nn.Module,
        batch: Any,
        compute_loss: Callable[[nn.Module, Any], Loss],
        broadcast: Broadcast,
        kept: Kept,
    ) -> Any:
        """What a client minimizes, where that is more than the loss with a :class:`Correction`.

        Clients whose strategy overrides it train one after the other. It is asked for each batch,
        in the run's precision; its value is the ``train_loss`` that reports give.

        Args:
            model: as it is at this step, its parameters live.
            batch: on the model's device.
            compute_loss: the run's loss of a model and a batch. Of its three parts (mean, outputs,
                terms) change the mean: ``found._replace(mean=found.mean + term)``.
            broadcast: what the client received.
            kept: what the strategy keeps for it.

        Returns:
            What ``compute_loss`` may return, too.
        """
        return compute_loss(model, batch)

    def client_extra(
        self, broadcast: Broadcast, kept: Kept, update: State, steps: LocalSteps
    ) -> Kept:
        """The groups of ``uplink``, of a client that trained."""
        return {}

    def next_kept(
        self, broadcast: Broadcast, kept: Kept, update: State, extra: Kept, steps: LocalSteps
    ) -> Kept:
        """What to keep for a client whose update is used.

        Update and extra are what the server uses: decoded and clipped. What is kept then agrees
        with what the server makes of them.
        """
        return {}

    def server_step(self, server: ServerState, mean: CohortMean) -> ServerState:
        """Make w_{t+1} from w_t and what the cohort sent, of the parameters that trained.

        w_{t+1} = w_t + Δ
        """
        return advance(server, mean.update)


def advance(
    server: ServerState, step: State, optimizer: Mapping[str, State] | None = None
) -> ServerState:
    """The next server state: every entry moved by its step."""
    params = {name: w + step[name] for name, w in server.params.items()}
    kept = server.optimizer if optimizer is None else optimizer
    return replace(server, round=server.round + 1, params=params, optimizer=kept)


def moment(server: ServerState, name: str, start: float = 0.0) -> State:
    """A server optimizer's running state of this name, ``start`` everywhere at first.

    Of a complex number both parts are.
    """
    kept = server.optimizer.get(name, {})
    return {
        n: kept[n] if n in kept else from_real(torch.full_like(as_real(w), start), w)
        for n, w in server.params.items()
    }


def uneven_means(args: FederatedArguments) -> str | None:
    """Whether the cohort's mean would not be the plain mean of clients drawn alike."""
    if args.client_sampling != "uniform":
        return f"client_sampling={args.client_sampling!r}: its sums over clients count all alike"
    if args.aggregation != "mean":
        return f"aggregation={args.aggregation!r}: the server's state is a mean of the clients'"
    return None
