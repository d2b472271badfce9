"""Clients on nodes, as a run sees them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from ...comm.errors import PayloadError
from ...federation.arguments import FederatedArguments
from ...federation.folder.history import History
from ...federation.server.opened import OpenRound
from ...federation.server.round import RoundServer
from ...federation.state import Outcome, RoundReport, ServerState
from ..engine.answers import check_came, outcome_of, refused, run_name, used_last
from ..engine.node import Job
from .directory import Directory
from .exchange import Pending, collect, dispatch
from .messages import job_record, read_answer

logger = logging.getLogger("flwr.fedpara")

_RUN_FILE = "flower-run.txt"


class FlowerBackend:
    """Clients on the nodes of a grid; see :class:`~fedpara_peft.federation.backend.Backend`.

    Args:
        grid: the way to the nodes.
        args: the run's settings.
        rounds: decodes and admits payloads.
        num_examples: of every client, filled in when its node has said so.
        deadline_s: how long a round waits for answers, and its beginning for nodes.
        expected: what every node must have been given, by name.
    """

    needs_payload = True

    def __init__(
        self,
        grid: Grid,
        args: FederatedArguments,
        rounds: RoundServer,
        num_examples: list[int],
        deadline_s: float,
        expected: Mapping[str, Any],
    ) -> None:
        self._grid = grid
        self._args = args
        self._rounds = rounds
        self._deadline_s = deadline_s
        self._directory = Directory(grid, len(num_examples), deadline_s, expected)
        self._pending = Pending()
        self._run_name = ""
        self._used: dict[int, int] = {}
        self._needed: tuple[int, ...] = ()
        self.names: Sequence[Any] = range(len(num_examples))
        self.num_examples = num_examples

    def facts(self) -> dict[str, Any]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        return {"clients": {"number of clients": len(self.names)}}

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """Take up the run's name, and wait for the nodes.

        Raises:
            ResumeError: the checkpoint is of a run in one place.
            RoundError: no node came in time, or too few to sample by their examples.
            AgreementError: those that came were given another run.
        """
        name_file = Path(self._args.output_dir) / _RUN_FILE
        self._run_name = run_name(name_file, server.round, logger)
        self._used = used_last(history)
        self._needed = (*saved, server.round)
        self._introduce()

    def send(self, opened: OpenRound) -> Collection[int]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        clients = set(opened.reporting)
        if clients and not self._directory.wait_for(clients, self._deadline_s, all=False):
            logger.warning("round %d: no sampled client is connected", opened.number + 1)
        jobs = {}
        for client in opened.reporting:
            payload = opened.sent_to(client).payload
            data, kept = payload.data if payload else b"", self._used.get(client, 0)
            needed = self._needed_of(client)
            jobs[client] = job_record(Job(self._run_name, opened.number, kept, needed, data))
        group = str(opened.number + 1)
        self._pending = dispatch(self._grid, self._directory, jobs, group, self._deadline_s)
        return list(self._pending.expected.values())

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        replies = collect(self._grid, self._directory, self._pending)
        silent = [client for client in opened.reporting if client not in replies.content]
        if silent:
            logger.warning(
                "round %d goes on without clients %s (deadline %g s)",
                opened.number + 1, silent, self._deadline_s,
            )  # fmt: skip
        for client in opened.reporting:
            if client in replies.content:
                yield self._outcome(opened, client, replies.content[client])
        for beside in replies.refused:
            reported = beside.client in replies.content
            yield Outcome(beside.client, refused=beside, reported=reported)

    def end_round(self, opened: OpenRound, report: RoundReport, needed: Collection[int]) -> None:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it: the next jobs tell it."""
        self._used.update(used_last([report]))
        self._needed = tuple(needed)

    def commit(self) -> None:
        """Nothing to do: nodes write what their clients keep before they answer."""

    def rollback(self, round: int) -> None:
        """Nothing to do: the next jobs say which state of a client goes with the server's."""

    def evaluate(self, server: ServerState) -> Mapping[str, Mapping[Any, float]]:
        """Nothing: clients' own data are not evaluated on nodes."""
        return {}

    def _needed_of(self, client: int) -> tuple[int, ...]:
        """Versions of a client's state to which the server may return."""
        return self._needed

    def _outcome(self, opened: OpenRound, client: int, content: RecordDict) -> Outcome:
        """What a client sent, used or refused by name."""
        try:
            answer = read_answer(content)
        except PayloadError as error:
            return refused(client, error)
        return outcome_of(self._rounds, opened, client, answer)

    def _introduce(self) -> None:
        """Learn how many examples every client has, as far as nodes have come."""
        directory, everybody = self._directory, set(self.names)
        logger.info("waiting for %d clients", len(everybody))
        directory.wait_for(everybody, self._deadline_s, all=True)
        check_came(
            sorted(everybody - directory.nodes.keys()), directory.unlike, len(everybody),
            self._deadline_s, self._args.client_sampling, logger,
        )  # fmt: skip
        for client, count in directory.num_examples.items():
            self.num_examples[client] = count
