"""What backends have in common whose clients are on nodes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...comm.errors import PayloadError
from ...federation.arguments import FederatedArguments
from ...federation.folder.history import History
from ...federation.server.opened import OpenRound
from ...federation.server.round import RoundServer
from ...federation.state import Outcome, RoundReport, ServerState
from .answers import Answers, outcome_of, refused, run_name, used_last
from .jobs import Answer, Job


class OnNodes:
    """Part of a backend over nodes: the run's name, and which states of clients are used.

    Args:
        args: the run's settings.
        rounds: decodes and admits payloads.
        num_examples: of every client, filled in when its node has said so.
        deadline_s: how long a round waits for answers, and its beginning for nodes.
        logger: the engine's.
    """

    needs_payload = True

    def __init__(
        self,
        args: FederatedArguments,
        rounds: RoundServer,
        num_examples: list[int],
        deadline_s: float,
        logger: logging.Logger,
    ) -> None:
        self._args = args
        self._rounds = rounds
        self._deadline_s = deadline_s
        self._logger = logger
        self._run_name = ""
        self._used: dict[int, int] = {}
        self._needed: tuple[int, ...] = ()
        self.names: Sequence[Any] = range(len(num_examples))
        self.num_examples = num_examples

    def facts(self) -> dict[str, Any]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        return {"clients": {"number of clients": len(self.names)}}

    def send(self, opened: OpenRound) -> Collection[int]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        return self.post(opened, {client: self._job(opened, client) for client in opened.reporting})

    def post(self, opened: OpenRound, jobs: Mapping[int, Job]) -> Collection[int]:
        """Send clients their jobs; to whom one went."""
        raise NotImplementedError

    def heard(self, opened: OpenRound) -> Answers:
        """What they answer until all have, or the deadline has passed."""
        raise NotImplementedError

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it."""
        found = self.heard(opened)
        answers, beside = dict(found.answers), list(found.beside)
        if jobs := self._whole_jobs(opened, answers):  # they have a deadline anew
            self._count_whole(opened, self.post(opened, jobs))
            more = self.heard(opened)
            answers |= more.answers
            beside += more.beside
        for client in opened.reporting:
            if client in answers:
                yield self._outcome(opened, client, answers[client])
        for wrong in sorted(beside, key=lambda refused: refused.client):
            yield Outcome(wrong.client, refused=wrong, reported=wrong.client in answers)

    def _outcome(self, opened: OpenRound, client: int, answer: Answer | PayloadError) -> Outcome:
        """What a client sent, used or refused by name."""
        if isinstance(answer, PayloadError):
            return refused(client, answer)
        return outcome_of(self._rounds, opened, client, answer)

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

    def _take_up(
        self, file_name: str, server: ServerState, history: History, saved: Sequence[int]
    ) -> None:
        """The run's name, kept in a file of ``output_dir``, and the states that belong to it."""
        name_file = Path(self._args.output_dir) / file_name
        self._run_name = run_name(name_file, server.round, self._logger)
        self._used = used_last(history)
        self._needed = (*saved, server.round)

    def job(self, opened: OpenRound, client: int) -> Job:
        """What a client is asked to do in a round in the clear."""
        return self._job(opened, client)

    def _job(self, opened: OpenRound, client: int, *, whole: bool = False) -> Job:
        """What a client is asked to do.

        Args:
            opened: the round.
            client: client index.
            whole: send all of the remainders, to a client that has lost its own.
        """
        payload = opened.sent_to(client).payload
        data, kept = payload.data if payload else b"", self._used.get(client, 0)
        missed: tuple[int, ...] = ()
        if opened.exact is not None:
            caught = opened.exact.catch_up(opened.server, client, whole=whole)
            missed, data = caught.numbers, data + caught.encode(opened.server).data
        return Job(
            self._run_name, opened.number, kept, self._needed_of(client), data, missed,
            opened.server.clip_norm,
        )  # fmt: skip

    def _whole_jobs(
        self, opened: OpenRound, answers: Mapping[int, Answer | PayloadError]
    ) -> dict[int, Job]:
        """For clients that have lost their remainders, what they are asked once more.

        A client may say so as often as it likes: it costs a second message, and nothing else
        depends on it.
        """
        if opened.exact is None:
            return {}
        behind = [
            client
            for client, answer in answers.items()
            if isinstance(answer, Answer) and answer.reason == "behind"
        ]
        if behind:
            self._logger.warning(
                "round %d: clients %s have lost their remainders and are sent them whole",
                opened.number + 1, behind,
            )  # fmt: skip
        return {client: self._job(opened, client, whole=True) for client in behind}

    def _count_whole(self, opened: OpenRound, clients: Collection[int]) -> None:
        """Count what these clients were sent once more."""
        opened.updates.beside += [
            (client, "downlink", opened.size_to(client, whole=True)) for client in clients
        ]

    def _needed_of(self, client: int) -> tuple[int, ...]:
        """Versions of a client's state to which the server may return."""
        return self._needed

    def _tell_of_silent(
        self, opened: OpenRound, asked: Collection[int], came: Collection[int]
    ) -> None:
        silent = [client for client in asked if client not in came]
        if silent:
            self._logger.warning(
                "round %d goes on without clients %s (deadline %g s)",
                opened.number + 1, silent, self._deadline_s,
            )  # fmt: skip
