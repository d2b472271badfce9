"""What a strategy may do differently from the plain round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ...comm.state import State
from ..state import Broadcast, CohortMean, ServerState

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


@dataclass(frozen=True)
class LocalSteps:
    """How a client trained.

    Attributes:
        count: its optimizer steps K.
        learning_rate: their learning rate η.
    """

    count: int
    learning_rate: float


class Strategy:
    """A federated optimizer. A subclass overrides only what its paper changes.

    Strategies hold settings, never state: what must survive a round is in :class:`ServerState`, or
    in the client's own state. All states are keyed by the names of the communicated parameters.
    """

    #: Weights of the cohort's mean: by the clients' examples, or all alike.
    weighting: ClassVar[Literal["num_examples", "uniform"]] = "num_examples"
    #: Whether anything travels at all.
    communicates: ClassVar[bool] = True

    def broadcast(self, server: ServerState) -> Kept:
        """What travels to the clients beside w_t, by name."""
        return {}

    def correction(self, broadcast: Broadcast, kept: Kept) -> Correction | None:
        """Correct a client's gradients; ``kept`` is what the strategy keeps for this client."""
        return None

    def next_client_state(
        self, broadcast: Broadcast, kept: Kept, update: State, steps: LocalSteps
    ) -> tuple[Kept, Kept]:
        """What to keep for a client that trained, and what it sends beside its update."""
        return {}, {}

    def server_step(self, server: ServerState, mean: CohortMean) -> ServerState:
        """Make w_{t+1} from w_t and what the cohort sent.

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


def optimized(server: ServerState) -> list[str]:
    """Names that a server optimizer moves: parameters. Buffers take their plain mean."""
    return [name for name in server.params if name not in server.buffers]


def moment(server: ServerState, name: str, start: float = 0.0) -> State:
    """A server optimizer's running state of this name, ``start`` everywhere at first."""
    kept = server.optimizer.get(name, {})
    return {
        n: kept[n] if n in kept else torch.full_like(server.params[n], start)
        for n in optimized(server)
    }
