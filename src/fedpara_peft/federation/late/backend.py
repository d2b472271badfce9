"""A simulation in which rounds do not wait for every client."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ...comm.state import State
from ..client.turn import at_rest
from ..folder.history import History
from ..server.opened import OpenRound
from ..simulation import Simulation
from ..state import ClientState, ClientUpdate, Flight, Outcome, RoundReport, ServerState


class LateClients:
    """Clients of a simulation that may report in a later round; see :class:`~..backend.Backend`.

    A client trains when its turn begins, from the broadcast of that round. What it sends, and what
    it keeps, waits in the server's state until the simulated clock says that the turn has ended;
    so a checkpoint has it, and a client's own model does not show what has not happened yet.

    Args:
        simulation: lets clients take their turns.
    """

    needs_payload = False

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.names: Sequence[Any] = simulation.names
        self.num_examples: Sequence[int] = simulation.num_examples

    def facts(self) -> dict[str, Any]:
        """As the simulation has it."""
        return self._simulation.facts()

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """As the simulation has it."""
        self._simulation.begin(server, history, saved)

    def send(self, opened: OpenRound) -> Collection[int]:
        """As the simulation has it: to those who begin in this round."""
        return self._simulation.send(opened)

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """How the turns ended that end in this round, whenever they began; in client order."""
        late, held = opened.late, _Held()
        assert late is not None
        began = {
            outcome.client: outcome
            for outcome in self._simulation.turns(opened.reporting, opened, keep=held)
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
                self._simulation.store.put(outcome.client, opened.number + 1, state)
            yield dataclasses.replace(outcome, update=_moved(outcome.update, like))

    def end_round(self, opened: OpenRound, report: RoundReport, needed: Collection[int]) -> None:
        """As the simulation has it."""
        self._simulation.end_round(opened, report, needed)

    def commit(self) -> None:
        """As the simulation has it."""
        self._simulation.commit()

    def rollback(self, round: int) -> None:
        """As the simulation has it."""
        self._simulation.rollback(round)

    def evaluate(self, server: ServerState) -> Mapping[str, Mapping[Any, float]]:
        """As the simulation has it."""
        return self._simulation.evaluate(server)


class _Held:
    """What clients will keep, until their turns have ended."""

    def __init__(self) -> None:
        self.states: dict[int, ClientState] = {}

    def put(self, client: int, version: int, state: ClientState) -> None:
        """Hold a client's new state."""
        self.states[client] = state


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
