"""Where clients train: what a run asks of a simulation, of several processes, of an engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from .folder.history import History
from .server.opened import OpenRound
from .state import Outcome, RoundReport, ServerState


class Backend(Protocol):
    """The clients of a run, wherever they are."""

    @property
    def names(self) -> Sequence[Any]:
        """The clients' names; a client is its index here."""

    @property
    def num_examples(self) -> Sequence[int]:
        """Their sizes, known at the latest when :meth:`begin` has returned."""

    @property
    def needs_payload(self) -> bool:
        """Whether the broadcast must be there as bytes."""

    def facts(self) -> dict[str, Any]:
        """What a resumed run's clients must have in common with the interrupted run's."""

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """Go to the state that the run starts from; what clients learnt after it is forgotten.

        Args:
            server: the server between two rounds.
            history: the rounds before.
            saved: rounds of the checkpoints that are kept.
        """

    def send(self, opened: OpenRound) -> Collection[int]:
        """Send the broadcast; the clients that it went to, in ascending order."""

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """How the clients' turns ended, in client order; who is missing did not report."""

    def end_round(self, opened: OpenRound, report: RoundReport, needed: Collection[int]) -> None:
        """A round is over.

        Args:
            opened: the round.
            report: what happened in it.
            needed: rounds to which the run may return: states of no other need be kept.
        """

    def commit(self) -> None:
        """Make durable what clients keep, because a checkpoint is about to speak of it."""

    def rollback(self, round: int) -> None:
        """A round has failed: forget what clients learnt after this one."""

    def evaluate(self, server: ServerState) -> Mapping[str, Mapping[Any, float]]:
        """Every client's own model on its own data: by metric and client; empty without data."""


B = TypeVar("B", bound=Backend)


class Over(Generic[B]):
    """Part of a backend over another one: all but how its clients' turns end.

    Args:
        below: lets clients take their turns.
    """

    needs_payload = False

    def __init__(self, below: B) -> None:
        self._below = below

    @property
    def names(self) -> Sequence[Any]:
        """As the backend below has it."""
        return self._below.names

    @property
    def num_examples(self) -> Sequence[int]:
        """As the backend below has it."""
        return self._below.num_examples

    def facts(self) -> dict[str, Any]:
        """As the backend below has it."""
        return self._below.facts()

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """As the backend below has it."""
        self._below.begin(server, history, saved)

    def send(self, opened: OpenRound) -> Collection[int]:
        """As the backend below has it: to those who begin in this round."""
        return self._below.send(opened)

    def end_round(self, opened: OpenRound, report: RoundReport, needed: Collection[int]) -> None:
        """As the backend below has it."""
        self._below.end_round(opened, report, needed)

    def commit(self) -> None:
        """As the backend below has it."""
        self._below.commit()

    def rollback(self, round: int) -> None:
        """As the backend below has it."""
        self._below.rollback(round)

    def evaluate(self, server: ServerState) -> Mapping[str, Mapping[Any, float]]:
        """As the backend below has it."""
        return self._below.evaluate(server)
