"""What a strategy may do differently from the plain round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..state import ServerState


class Strategy:
    """A federated optimizer. A subclass overrides only what its paper changes.

    Strategies hold settings, never state: what must survive a round is in :class:`ServerState`.
    """

    def server_step(self, server: ServerState, mean_update: Mapping[str, Tensor]) -> ServerState:
        """Make w_{t+1} from w_t and the cohort's mean update.

        w_{t+1} = w_t + Δ
        """
        params = {name: w + mean_update[name] for name, w in server.params.items()}
        return replace(server, round=server.round + 1, params=params)
