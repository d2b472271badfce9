"""Clients on sites, as a run sees them."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from nvflare.apis.shareable import Shareable

from ...comm.errors import PayloadError
from ...federation.arguments import FederatedArguments
from ...federation.data.fingerprint import differences, shown_differences
from ...federation.folder.history import History
from ...federation.server.opened import OpenRound
from ...federation.server.round import RoundServer
from ...federation.state import ServerState
from ..engine.answers import Answers, check_came, read
from ..engine.backend import OnNodes
from ..engine.jobs import Job
from .messages import INTRODUCE, TRAIN, job_message, read_answer, read_introduction
from .sites import Heard, Sites

logger = logging.getLogger(__name__)

_RUN_FILE = "nvflare-run.txt"


class FlareBackend(OnNodes):
    """Clients on the sites of a job; see :class:`~fedpara_peft.federation.backend.Backend`.

    Args:
        sites: the way to them.
        args: the run's settings.
        rounds: decodes and admits payloads.
        num_examples: of every client, filled in when its site has said so.
        deadline_s: how long a round waits for answers, and its beginning for sites.
        expected: what every site must have been given, by name.
    """

    def __init__(
        self,
        sites: Sites,
        args: FederatedArguments,
        rounds: RoundServer,
        num_examples: list[int],
        deadline_s: float,
        expected: Mapping[str, Any],
    ) -> None:
        super().__init__(args, rounds, num_examples, deadline_s, logger)
        self._sites = sites
        self._expected = expected
        self._present: set[int] = set()
        self._late: queue.Queue[Heard] = queue.Queue()
        self._unlike: dict[int, str] = {}
        self._replies: queue.Queue[Heard] = queue.Queue()
        self._asked: dict[int, Callable[[], None]] = {}
        self._wanted: list[int] = []
        self._end = 0.0

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """Take up the run's name, and wait for the sites.

        Raises:
            ResumeError: the checkpoint is of a run in one place.
            RoundError: no site came in time, or too few to sample by their examples.
            AgreementError: those that came were given another run.
        """
        self._take_up(_RUN_FILE, server, history, saved)
        everybody = set(self.names)
        logger.info("waiting for %d clients", len(everybody))
        for client in self.names:  # the question stands: whoever comes late answers it, too
            self._sites.ask(INTRODUCE, client, Shareable(), self._late.put)
        end = time.monotonic() + self._deadline_s
        for client, message in self._sites.heard(self._late, everybody, end):
            self._meet(client, message)
        check_came(
            sorted(everybody - self._present), self._unlike, len(everybody),
            self._deadline_s, self._args.client_sampling, logger,
        )  # fmt: skip

    def post(self, opened: OpenRound, jobs: Mapping[int, Job]) -> Collection[int]:
        """Send clients their jobs; to whom one went."""
        while not self._late.empty():
            self._meet(*self._late.get())
        self._wanted, self._asked = list(jobs), {}
        self._replies = queue.Queue()  # answers to former messages go nowhere
        for client, job in jobs.items():
            if client in self._present:
                message = job_message(job)
                self._asked[client] = self._sites.ask(TRAIN, client, message, self._replies.put)
        self._end = time.monotonic() + self._deadline_s
        return list(self._asked)

    def heard(self, opened: OpenRound) -> Answers:
        """What they answer until all have, or the deadline has passed."""
        heard = dict(self._sites.heard(self._replies, set(self._asked), self._end))
        for client, take_back in self._asked.items():
            if client not in heard:
                take_back()
        came = {client: message for client, message in heard.items() if message is not None}
        self._tell_of_silent(opened, self._wanted, came)
        return Answers({client: read(read_answer, message) for client, message in came.items()})

    def _meet(self, client: int, message: Shareable | None) -> None:
        """Take up a site that says what it has, if it was given the same run."""
        site = self._sites.names[client]
        if message is None or client in self._present:
            return
        try:
            own = read_introduction(message)
        except PayloadError as error:
            logger.warning("site %s: %s", site, error)
            return
        if differing := differences(self._expected, own.facts):
            shown = shown_differences(differing, "here", "there")
            self._unlike[client] = f"site {site} (client {client}): {shown}"
            logger.warning("refused: %s", self._unlike[client])
            return
        self._present.add(client)
        self.num_examples[client] = own.num_examples
