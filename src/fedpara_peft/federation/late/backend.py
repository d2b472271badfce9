"""A simulation in which rounds do not wait for every client."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ...comm.state import State
from ..backend import Over
from ..client.turn import Held, at_rest
from ..server.opened import OpenRound
from ..simulation import Simulation
from ..state import ClientUpdate, Flight, Outcome


class LateClients(Over[Simulation]):
    """Clients of a simulation that may report in a later round; see :class:`~..backend.Backend`.

    A client trains when its turn begins, from the broadcast of that round. What it sends, and what
    it keeps, waits in the server's state until the simulated clock says that the turn has ended;
    so a checkpoint has it, and a client's own model does not show what has not happened yet.

    Args:
        simulation: lets clients take their turns.
    """

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """How the turns ended that end in this round, whenever they began; in client order."""
        late, held = opened.late, Held()
        assert late is not None
        began = {
            outcome.client: outcome
            for outcome in self._below.turns(opened.reporting, opened, keep=held)
        }
        for client in opened.cohort:
            outcome, state = began.get(client), held.states.get(client)
            if outcome is not None:
                outcome = dataclasses.replace(outcome, update=_moved(outcome.update), sent=None)
            finish_s = opened.finish_s[client]
            late.start(Flight(client, opened.number, finish_s, outcome, state))
        like = opened.server.params
        for outcome in late.first():
            state = late.flight(outcome.client).state
            if outcome.update is not None and state is not None:
                self._below.store.put(outcome.client, opened.number + 1, state)
            yield dataclasses.replace(outcome, update=_moved(outcome.update, like))


def _moved(update: ClientUpdate | None, like: State | None = None) -> ClientUpdate | None:
    """An update in main memory, where it waits; or where tensors of its names are."""
    if update is None:
        return None

    def placed(state: State) -> State:
        if like is None:
            return at_rest(state)
        return {name: tensor.to(like[name].device) for name, tensor in state.items()}

    return dataclasses.replace(
        update,
        update=placed(update.update),
        extra={group: placed(state) for group, state in update.extra.items()},
        buffers=placed(update.buffers),
    )
