"""A federation in one process: clients take their turns in one model."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import FederatedArguments
from .client.evaluation import Evaluator
from .client.local import LocalTrainer
from .client.stack.engine import BatchedTrainer
from .client.turn import Keeps, Turns
from .crew import Crew
from .data.fingerprint import population_facts
from .data.population import Population
from .errors import about
from .folder.history import History
from .folder.store import CLIENTS, ClientStore, DiskStore, MemoryStore
from .server.admission import usable_state
from .server.opened import OpenRound
from .server.ranks import ClientRanks
from .state import ClientState, Outcome, RoundReport, ServerState


class Simulation:
    """Clients of this process; see :class:`~.backend.Backend`.

    Args:
        args: the run's settings.
        population: the clients' names and data.
        local: trains one client after the other.
        stacked: trains several side by side, None where that is impossible or not wanted.
        turns: takes what they trained through the channel.
        evaluator: evaluates clients' own models.
        crew: the processes that share ``output_dir``.
        ranks: which columns each client has.
    """

    needs_payload = False

    def __init__(
        self,
        args: FederatedArguments,
        population: Population,
        local: LocalTrainer,
        stacked: BatchedTrainer | None,
        turns: Turns,
        evaluator: Evaluator,
        crew: Crew,
        ranks: ClientRanks,
    ) -> None:
        self._args = args
        self._population = population
        self._local = local
        self.stacked = stacked
        self._turns = turns
        self._evaluator = evaluator
        self._crew = crew
        self._ranks = ranks
        self.names: Sequence[Any] = population.names
        self.num_examples: Sequence[int] = population.num_examples
        self.store = self._opened()
        self._saved: frozenset[int] = frozenset()

    def facts(self) -> dict[str, Any]:
        """Who the clients are, and what their data look like."""
        population = self._population
        return {"clients": population_facts(self.names, self.num_examples, population.train)}

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """As :class:`~.backend.Backend` has it."""

        def step_back() -> None:
            disk = self._disk()
            disk.rollback(server.round) if server.round else disk.clear()

        self._crew.on_main(step_back)
        self._saved = frozenset(saved)
        self.store = self._opened()

    def send(self, opened: OpenRound) -> Collection[int]:
        """As :class:`~.backend.Backend` has it: it goes to the whole cohort."""
        return opened.cohort

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """As :class:`~.backend.Backend` has it."""
        return self.turns(opened.reporting, opened)

    def turns(
        self,
        clients: Sequence[int],
        opened: OpenRound,
        *,
        encode: bool = False,
        keep: Keeps | None = None,
    ) -> Iterator[Outcome]:
        """Let clients take their turns, side by side where that pays; in client order.

        Args:
            clients: some of the round's.
            opened: the round.
            encode: whether payloads are needed, not their lengths alone.
            keep: where to put what clients keep; the store by default.
        """
        with self._local.at_work(opened.resting):
            yield from self._each(clients, opened, encode, keep or self.store)

    def end_round(self, opened: OpenRound, report: RoundReport, needed: Collection[int]) -> None:
        """As :class:`~.backend.Backend` has it."""
        saved = frozenset(needed) - {report.round}
        # Where the checkpoints have changed, everybody's states are looked through.
        touched = opened.ended if saved == self._saved else None
        self._saved = saved
        self.store.prune(needed, touched, owner=self._crew.is_main)

    def commit(self) -> None:
        """As :class:`~.backend.Backend` has it."""
        self._crew.together(self.store.commit)

    def rollback(self, round: int) -> None:
        """As :class:`~.backend.Backend` has it."""
        self.store.rollback(round, owner=self._crew.is_main)

    def evaluate(self, server: ServerState) -> Mapping[str, Mapping[Any, float]]:
        """As :class:`~.backend.Backend` has it; the processes share the clients."""
        data = self._population.eval
        if data is None:
            return {}
        found = self._crew.together(lambda: self._evaluated(server, data))
        by_client = {client: metrics for part in found for client, metrics in part.items()}
        metrics = sorted({name for values in by_client.values() for name in values})
        return {
            metric: {
                self.names[client]: by_client[client][metric]
                for client in sorted(by_client)
                if metric in by_client[client]
            }
            for metric in metrics
        }

    def _evaluated(self, server: ServerState, data: Sequence[Any]) -> dict[int, dict[str, float]]:
        found = {}
        for client in range(self._crew.index, len(self.names), self._crew.size):
            params = self._ranks.only(server.params, self._ranks.level(client))
            self._local.load(params, self._kept(client))
            with about(self.names[client]):
                found[client] = self._evaluator(self._local.model, data[client])
        self._local.load(server.params)
        return found

    def _each(
        self, clients: Sequence[int], opened: OpenRound, encode: bool, keep: Keeps
    ) -> Iterator[Outcome]:
        data: dict[int, Any] = {}
        states: dict[int, ClientState | None] = {}
        ended: dict[int, Any] = {}
        shares: dict[int, float] = {}
        stacked = self.stacked
        if stacked is not None and stacked.wanted(len(clients)):
            data = {client: self._population.train[client] for client in clients}
            states = {client: self._kept(client) for client in clients}
            for group in self._alike(stacked, data, states):
                start = time.perf_counter()
                found = stacked.train(
                    group, [data[c] for c in group], opened.number,
                    opened.sent_to(group[0]).broadcast,
                    [states[c] for c in group], opened.resting,
                )  # fmt: skip
                if found is None:  # they go one by one
                    break
                ended.update(zip(group, found, strict=True))
                share = (time.perf_counter() - start) / len(group)
                shares.update(dict.fromkeys(group, share))
        for client in clients:
            if client in ended:
                train = functools.partial(self._local.end, *ended.pop(client))
            else:
                # Read here: a state that is damaged is the run's fault, and no client's failure.
                state = states[client] if client in states else self._kept(client)
                train = functools.partial(self._alone, client, data, state, opened)
            yield self._turns.take(
                client, opened.number, train, keep,
                encode=encode, seconds=shares.get(client, 0.0),
                noise_seed=opened.server.noise_seed,
            )  # fmt: skip

    def _alone(
        self,
        client: int,
        data: Mapping[int, Any],
        state: ClientState | None,
        opened: OpenRound,
    ) -> Any:
        own = data[client] if client in data else self._population.train[client]
        return self._local.train(
            client, own, opened.number, opened.sent_to(client).broadcast, state, opened.resting
        )

    def _alike(
        self,
        stacked: BatchedTrainer,
        data: Mapping[int, Any],
        states: Mapping[int, ClientState | None],
    ) -> list[list[int]]:
        """Stacks of clients, each of clients of one rank."""
        levels = dict.fromkeys(self._ranks.level(client) for client in data)
        return [
            group
            for level in levels
            for group in stacked.groups(
                {c: own for c, own in data.items() if self._ranks.level(c) == level}, states
            )
        ]

    def _kept(self, client: int) -> ClientState | None:
        """What a client kept, as far as it is whole."""
        local = self._local
        kept = self.store.get(client)
        found = usable_state(kept, local.local, local.shared, self.names[client])
        return self._ranks.own(found, local.first_local, client)

    def _disk(self) -> DiskStore:
        return DiskStore(Path(self._args.output_dir) / CLIENTS, self.names)

    def _opened(self) -> ClientStore:
        wanted = self._args.client_store
        in_memory = wanted == "memory" or (wanted == "auto" and self._crew.size == 1)
        return MemoryStore(self._disk()) if in_memory else self._disk()
