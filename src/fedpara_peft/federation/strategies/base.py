"""What a strategy may do differently from the plain round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...comm.state import State
from ..state import ServerState


class Strategy:
    """A federated optimizer. A subclass overrides only what its paper changes.

    Strategies hold settings, never state: what must survive a round is in :class:`ServerState`.
    """

    def correct(
        self, grads: Mapping[str, Tensor], params: Mapping[str, Tensor], broadcast: State
    ) -> Mapping[str, Tensor]:
        """Correct a client's gradients before its local step (and before they are clipped).

        Args:
            grads: gradient of every trained parameter, by name.
            params: the parameters w.
            broadcast: w_t as received.
        """
        return grads

    def server_step(self, server: ServerState, mean_update: Mapping[str, Tensor]) -> ServerState:
        """Make w_{t+1} from w_t and the cohort's mean update Δ.

        w_{t+1} = w_t + Δ
        """
        return advance(server, mean_update)


def advance(
    server: ServerState,
    step: Mapping[str, Tensor],
    optimizer: Mapping[str, State] | None = None,
) -> ServerState:
    """The next server state: every entry moved by its step."""
    params = {name: w + step[name] for name, w in server.params.items()}
    kept = server.optimizer if optimizer is None else optimizer
    return replace(server, round=server.round + 1, params=params, optimizer=kept)


def optimized(server: ServerState) -> list[str]:
    """Names that a server optimizer moves: parameters. Buffers take their plain mean."""
    return [name for name in server.params if name not in server.buffers]


def moment(server: ServerState, name: str, start: float = 0.0) -> State:
    """A server optimizer's running state of this name, ``start`` everywhere in the first round."""
    if name in server.optimizer:
        return dict(server.optimizer[name])
    return {n: torch.full_like(server.params[n], start) for n in optimized(server)}
