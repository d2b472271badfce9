"""Clients on sites, as a run sees them."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.shareable import Shareable

from ...comm.errors import PayloadError
from ...federation.arguments import FederatedArguments
from ...federation.data.fingerprint import differences, shown_differences
from ...federation.folder.history import History
from ...federation.server.opened import OpenRound
from ...federation.server.round import RoundServer
from ...federation.state import Outcome, RoundReport, ServerState
from ..engine.answers import check_came, outcome_of, refused, run_name, used_last
from ..engine.node import Job
from .messages import INTRODUCE, TRAIN, job_message, read_answer, read_introduction
from .sites import Heard, Sites

logger = logging.getLogger(__name__)

_RUN_FILE = "nvflare-run.txt"


class FlareBackend:
    """Clients on the sites of a job; see :class:`~fedpara_peft.federation.backend.Backend`.

    Args:
        sites: the way to them.
        args: the run's settings.
        rounds: decodes and admits payloads.
        num_examples: of every client, filled in when its site has said so.
        deadline_s: how long a round waits for answers, and its beginning for sites.
        expected: what every site must have been given, by name.
    """

    needs_payload = True

    def __init__(
        self,
        sites: Sites,
        args: FederatedArguments,
        rounds: RoundServer,
        num_examples: list[int],
        deadline_s: float,
        expected: Mapping[str, Any],
    ) -> None:
        self._sites = sites
        self._args = args
        self._rounds = rounds
        self._deadline_s = deadline_s
        self._expected = expected
        self._present: set[int] = set()
        self._late: queue.Queue[Heard] = queue.Queue()
        self._unlike: dict[int, str] = {}
        self._replies: queue.Queue[Heard] = queue.Queue()
        self._asked: dict[int, Callable[[], None]] = {}
        self._end = 0.0
        self._run_name = ""
        self._used: dict[int, int] = {}
        self._needed: tuple[int, ...] = ()
        self.names: Sequence[Any] = range(len(num_examples))
        self.num_examples = num_examples

    def facts(self) -> dict[str, Any]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        return {"clients": {"number of clients": len(self.names)}}

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """Take up the run's name, and wait for the sites.

        Raises:
            ResumeError: the checkpoint is of a run in one place.
            RoundError: no site came in time, or too few to sample by their examples.
            AgreementError: those that came were given another run.
        """
        name_file = Path(self._args.output_dir) / _RUN_FILE
        self._run_name = run_name(name_file, server.round, logger)
        self._used = used_last(history)
        self._needed = (*saved, server.round)
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
        while not self._late.empty():
            self._meet(*self._late.get())
        self._replies, self._asked = queue.Queue(), {}  # answers to former rounds go nowhere
        for client in opened.reporting:
            if client in self._present:
                payload = opened.sent_to(client).payload
                data, kept = payload.data if payload else b"", self._used.get(client, 0)
                job = Job(self._run_name, opened.number, kept, self._needed, data)
                message = job_message(job)
                self._asked[client] = self._sites.ask(TRAIN, client, message, self._replies.put)
        self._end = time.monotonic() + self._deadline_s
        return list(self._asked)

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        heard = dict(self._sites.heard(self._replies, set(self._asked), self._end))
        for client, take_back in self._asked.items():
            if client not in heard:
                take_back()
        came = {client: message for client, message in heard.items() if message is not None}
        silent = [client for client in opened.reporting if client not in came]
        if silent:
            logger.warning(
                "round %d goes on without clients %s (deadline %g s)",
                opened.number + 1, silent, self._deadline_s,
            )  # fmt: skip
        for client in opened.reporting:
            if client in came:
                yield self._outcome(opened, client, came[client])

    def end_round(self, opened: OpenRound, report: RoundReport, needed: Collection[int]) -> None:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it: the next jobs tell it."""
        self._used.update(used_last([report]))
        self._needed = tuple(needed)

    def commit(self) -> None:
        """Nothing to do: sites write what their clients keep before they answer."""

    def rollback(self, round: int) -> None:
        """Nothing to do: the next jobs say which state of a client goes with the server's."""

    def evaluate(self, server: ServerState) -> Mapping[str, Mapping[Any, float]]:
        """Nothing: clients' own data are not evaluated on sites."""
        return {}

    def _outcome(self, opened: OpenRound, client: int, message: Shareable) -> Outcome:
        try:
            answer = read_answer(message)
        except PayloadError as error:
            return refused(client, error)
        return outcome_of(self._rounds, opened, client, answer)

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
