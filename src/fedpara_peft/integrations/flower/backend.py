"""Clients on nodes, as a run sees them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flwr.serverapp import Grid

from ...federation.arguments import FederatedArguments
from ...federation.folder.history import History
from ...federation.server.opened import OpenRound
from ...federation.server.round import RoundServer
from ...federation.state import ServerState
from ..engine.answers import Answers, check_came, read
from ..engine.backend import OnNodes
from ..engine.jobs import Job
from .directory import Directory
from .exchange import Pending, collect, dispatch
from .messages import job_record, read_answer

logger = logging.getLogger("flwr.fedpara")

_RUN_FILE = "flower-run.txt"


class FlowerBackend(OnNodes):
    """Clients on the nodes of a grid; see :class:`~fedpara_peft.federation.backend.Backend`.

    Args:
        grid: the way to the nodes.
        args: the run's settings.
        rounds: decodes and admits payloads.
        num_examples: of every client, filled in when its node has said so.
        deadline_s: how long a round waits for answers, and its beginning for nodes.
        expected: what every node must have been given, by name.
    """

    def __init__(
        self,
        grid: Grid,
        args: FederatedArguments,
        rounds: RoundServer,
        num_examples: list[int],
        deadline_s: float,
        expected: Mapping[str, Any],
    ) -> None:
        super().__init__(args, rounds, num_examples, deadline_s, logger)
        self._grid = grid
        self._directory = Directory(grid, len(num_examples), deadline_s, expected)
        self._pending = Pending()
        self._asked: list[int] = []

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """Take up the run's name, and wait for the nodes.

        Raises:
            ResumeError: the checkpoint is of a run in one place.
            RoundError: no node came in time, or too few to sample by their examples.
            AgreementError: those that came were given another run.
        """
        self._take_up(_RUN_FILE, server, history, saved)
        self._introduce()

    def post(self, opened: OpenRound, jobs: Mapping[int, Job]) -> Collection[int]:
        """Send clients their jobs; to whom one went."""
        clients, self._asked = set(jobs), list(jobs)
        if clients and not self._directory.wait_for(clients, self._deadline_s, all=False):
            logger.warning("round %d: no sampled client is connected", opened.number + 1)
        records = {client: job_record(job) for client, job in jobs.items()}
        group = str(opened.number + 1)
        self._pending = dispatch(self._grid, self._directory, records, group, self._deadline_s)
        return list(self._pending.expected.values())

    def heard(self, opened: OpenRound) -> Answers:
        """What they answer until all have, or the deadline has passed."""
        replies = collect(self._grid, self._directory, self._pending)
        self._tell_of_silent(opened, self._asked, replies.content)
        answers = {c: read(read_answer, found) for c, found in replies.content.items()}
        return Answers(answers, replies.refused)

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
