"""Clients on nodes of whose updates the server sees the sum: the simulation's round by messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from ...comm.errors import PayloadError, SecureAggregationError
from ...comm.payload import PayloadSize
from ...comm.secure.messages import HEADER_BYTES, Kind
from ...federation.arguments import FederatedArguments
from ...federation.backend import Backend, Over
from ...federation.secure.round import Carried, SecureRound
from ...federation.server.opened import OpenRound
from ...federation.state import Outcome, Refused
from ...federation.strategies import Strategy
from .answers import Answers, refusal, refused
from .jobs import Answer, Job


class Messenger(Backend, Protocol):
    """A backend over nodes that takes other messages, too."""

    def job(self, opened: OpenRound, client: int) -> Job:
        """What a client is asked to do in a round in the clear."""

    def post(self, opened: OpenRound, jobs: Mapping[int, Job]) -> Collection[int]:
        """Send clients their jobs; to whom one went."""

    def heard(self, opened: OpenRound) -> Answers:
        """What they answer until all have, or the deadline has passed."""


class SecureNodes(Over[Messenger]):
    """Clients on nodes, of whose updates only bytes that say nothing reach the server.

    See :class:`~fedpara_peft.federation.backend.Backend`. A round takes four exchanges, each of
    which waits as long as a round in the clear. Whoever does not answer one is not asked again.

    Args:
        args: the run's settings.
        strategy: the federated optimizer.
        nodes: the way to them.
    """

    needs_payload = True

    def __init__(self, args: FederatedArguments, strategy: Strategy, nodes: Messenger) -> None:
        super().__init__(nodes)
        self._args = args
        self._strategy = strategy
        self._secure: SecureRound | None = None
        self._ended: list[Outcome] | None = None

    def send(self, opened: OpenRound) -> Collection[int]:
        """Exchange keys and shares, then send the broadcast to those that are left.

        Raises:
            SecureAggregationError: fewer clients than the threshold are; with ``quorum=0`` the
                round changes nothing instead.
        """
        self._secure = self._ended = None
        if not opened.reporting:
            return []
        secure = self._secure = SecureRound(self._args, self._strategy, opened)
        try:
            shares = secure.shares(_Link(self._below, opened))
        except SecureAggregationError as error:
            self._ended = secure.failed(error)
            return []
        jobs = {
            client: dataclasses.replace(
                self._below.job(opened, client), wants=Kind.MASKED.name, message=data
            )
            for client, data in shares.items()
        }
        sent = self._below.post(opened, jobs)
        for client in sent:
            secure.count(client, "downlink", shares[client])
        return sent

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """As :class:`~fedpara_peft.federation.backend.Backend` has it; the mean is in the round.

        Raises:
            SecureAggregationError: as :meth:`send` has it.
        """
        secure = self._secure
        if secure is None:
            return
        yield from secure.refused
        if self._ended is not None:
            yield from self._ended
            return
        heard = self._below.heard(opened)
        for client in opened.reporting:
            if client in heard.answers:
                yield secure.took(_outcome(opened, client, heard.answers[client]))
        for beside in heard.beside:
            yield Outcome(beside.client, refused=beside, reported=beside.client in heard.answers)
        try:
            secure.finish(_Link(self._below, opened))
        except SecureAggregationError as error:
            yield from secure.failed(error)


@dataclass(frozen=True)
class _Link:
    """Exchanges as jobs and answers; see :class:`~fedpara_peft.federation.secure.round.Carrier`.

    Attributes:
        nodes: the way to the nodes.
        opened: the round.
    """

    nodes: Messenger
    opened: OpenRound

    def carry(self, wanted: Kind, data: Mapping[int, bytes]) -> Carried:
        """Ask those clients that are there."""
        opened = self.opened
        jobs = {
            client: dataclasses.replace(
                self.nodes.job(opened, client), payload=b"", wants=wanted.name, message=text,
                cohort=opened.cohort if wanted is Kind.KEYS else (),
            )
            for client, text in data.items()
            if client in opened.reporting
        }  # fmt: skip
        sent, heard = self.nodes.post(opened, jobs), self.nodes.heard(opened)
        answers, wrong = {}, list(heard.beside)
        for client, answer in heard.answers.items():
            try:
                answers[client] = _message(opened, answer)
            except PayloadError as error:
                wrong.append(Refused(client, error.reason, str(error)))
        return Carried(sent, answers, wrong)


def _message(opened: OpenRound, answer: Answer | PayloadError) -> bytes:
    """The bytes of an answer to this round.

    Raises:
        PayloadError: there are none.
    """
    if isinstance(answer, PayloadError):
        raise answer
    if answer.reason:
        raise PayloadError(refusal(answer.reason), f"its node says {answer.message!r:.500}")
    if answer.round != opened.number:
        raise PayloadError(
            "stale", f"it answers round {answer.round + 1}, this is {opened.number + 1}"
        )
    return answer.payload


def _outcome(opened: OpenRound, client: int, answer: Answer | PayloadError) -> Outcome:
    """A masked update as it came."""
    data = answer.payload if isinstance(answer, Answer) else b""
    header = min(HEADER_BYTES, len(data))
    size = PayloadSize(header, len(data) - header) if data else None
    try:
        payload = _message(opened, answer)
    except PayloadError as error:
        return refused(client, error, size)
    return Outcome(client, size, payload=payload, seconds=None)
