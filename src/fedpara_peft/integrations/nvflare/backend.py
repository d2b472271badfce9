"""Clients on sites, as a run sees them."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from nvflare.apis.shareable import Shareable

from ...comm.errors import PayloadError
from ...federation.arguments import FederatedArguments
from ...federation.data.fingerprint import differences, shown_differences
from ...federation.folder.history import History
from ...federation.server.opened import OpenRound
from ...federation.server.round import RoundServer
from ...federation.state import Outcome, ServerState
from ..engine.answers import check_came, outcome_of, refused
from ..engine.backend import OnNodes
from ..engine.jobs import Answer, Job
from ..engine.secure import Answers
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

    def send(self, opened: OpenRound) -> Collection[int]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        return self.post(opened, {client: self._job(opened, client) for client in opened.reporting})

    def post(self, opened: OpenRound, jobs: Mapping[int, Job]) -> Collection[int]:
        """Send clients their jobs; to whom one went."""
        while not self._late.empty():
            self._meet(*self._late.get())
        self._wanted = list(jobs)
        here = {client: job for client, job in jobs.items() if client in self._present}
        self._ask(here)
        return list(here)

    def heard(self, opened: OpenRound) -> Answers:
        """What they answer until all have, or the deadline has passed."""
        came = self._came()
        self._tell_of_silent(opened, self._wanted, came)
        return Answers({client: read(message) for client, message in came.items()})

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        answers = {client: read(message) for client, message in self._came().items()}
        if jobs := self._whole_jobs(opened, answers):  # they have a deadline anew
            self._ask(jobs)
            self._count_whole(opened, jobs)
            answers |= {client: read(message) for client, message in self._came().items()}
        self._tell_of_silent(opened, opened.reporting, answers)
        for client in opened.reporting:
            if client not in answers:
                continue
            answer = answers[client]
            if isinstance(answer, PayloadError):
                yield refused(client, answer)
            else:
                yield outcome_of(self._rounds, opened, client, answer)

    def _ask(self, jobs: Mapping[int, Job]) -> None:
        """Give sites their jobs, and a deadline."""
        self._replies = queue.Queue()  # answers to former rounds go nowhere
        heard = self._replies.put
        self._asked = {
            c: self._sites.ask(TRAIN, c, job_message(job), heard) for c, job in jobs.items()
        }
        self._end = time.monotonic() + self._deadline_s

    def _came(self) -> dict[int, Shareable]:
        """What those that were asked answer in time."""
        heard = dict(self._sites.heard(self._replies, set(self._asked), self._end))
        for client, take_back in self._asked.items():
            if client not in heard:
                take_back()
        return {client: message for client, message in heard.items() if message is not None}

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


def read(message: Shareable) -> Answer | PayloadError:
    """An answer, or why it is none."""
    try:
        return read_answer(message)
    except PayloadError as error:
        return error
