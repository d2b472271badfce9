"""Nodes that answer when they are ready: rounds that do not wait for every client."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence

from flwr.app import Message

from ...federation.folder.history import History
from ...federation.server.opened import OpenRound
from ...federation.state import Flight, Outcome, RoundReport, ServerState
from ..engine.answers import read, used_last
from .backend import FlowerBackend
from .directory import FIRST_WAIT_S, LONGEST_WAIT_S, pulled
from .exchange import Replies, take
from .messages import read_answer

logger = logging.getLogger("flwr.fedpara")


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A job that waits for its answer.

    Attributes:
        client: client index.
        end: when the time to answer is up, by the monotonic clock.
    """

    client: int
    end: float


class LateNodes(FlowerBackend):
    """Clients on nodes, of whom a round takes those that answer first.

    An answer is decoded as of the round in which its job went out. Every job has ``deadline_s`` to
    be answered in, however many rounds that are. A server that was killed and continues has lost
    what was on its way: those clients did not report, their nodes step back, and they may be drawn
    again.
    """

    def begin(self, server: ServerState, history: History, saved: Sequence[int]) -> None:
        """As :class:`FlowerBackend` has it."""
        self._waiting: dict[str, _Sent] = {}
        self._arrived: deque[Message] = deque()
        super().begin(server, history, saved)
        self._used_at = {n: used_last(history.rounds[:n]) for n in self._needed}

    def send(self, opened: OpenRound) -> Collection[int]:
        """As :class:`FlowerBackend` has it: to those who begin in this round."""
        sent = super().send(opened)
        end = self._pending.end
        self._waiting |= {name: _Sent(c, end) for name, c in self._pending.expected.items()}
        return sent

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """How the turns ended that end in this round, whenever they began; in client order."""
        replies = Replies()
        found = self._first(opened, replies)
        for client in sorted(found):
            yield found[client]
        for refused in replies.refused:
            yield Outcome(refused.client, refused=refused, reported=refused.client in found)

    def end_round(self, opened: OpenRound, report: RoundReport, needed: Collection[int]) -> None:
        """As :class:`FlowerBackend` has it."""
        super().end_round(opened, report, needed)
        self._used_at[report.round] = dict(self._used)
        self._used_at = {n: used for n, used in self._used_at.items() if n in self._needed}

    def _first(self, opened: OpenRound, replies: Replies) -> dict[int, Outcome]:
        """Let turns end as answers come, until the buffer is full or nobody is at work."""
        late, directory = opened.late, self._directory
        assert late is not None
        for client in opened.cohort:
            late.start(Flight(client, opened.number))
        asked: dict[str, int] = {}  # also those who have answered in this round
        found: dict[int, Outcome] = {}
        pause, used = FIRST_WAIT_S, 0
        while True:
            if used >= late.size:
                return found
            asked |= {name: sent.client for name, sent in self._waiting.items()}
            if not self._arrived:
                self._arrived.extend(pulled(self._grid, list(self._waiting)))
                directory.refresh()
            self._give_up(opened)  # not before looking: what came in time counts
            if not late.at_work:
                return found
            if not self._arrived:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_WAIT_S)
                continue
            reply, pause = self._arrived.popleft(), FIRST_WAIT_S
            take(reply, asked, directory, replies)
            sent = self._waiting.pop(reply.metadata.reply_to_message_id, None)
            if sent is None:
                continue
            outcome = None
            if sent.client in replies.content:
                start = next(f.start for f in late.at_work if f.client == sent.client)
                began = dataclasses.replace(opened, number=start)
                outcome = self._outcome(
                    began, sent.client, read(read_answer, replies.content[sent.client])
                )
            outcome = late.end(sent.client, outcome)
            if outcome is not None:
                found[sent.client] = outcome
                used += outcome.update is not None

    def _give_up(self, opened: OpenRound) -> None:
        """End the turns of those who cannot answer any more: too late, or never asked."""
        assert opened.late is not None
        now, here = (
            time.monotonic(),
            {reply.metadata.reply_to_message_id for reply in self._arrived},
        )
        self._waiting = {
            name: sent for name, sent in self._waiting.items() if sent.end > now or name in here
        }
        asked = {sent.client for sent in self._waiting.values()}
        lost = [flight.client for flight in opened.late.at_work if flight.client not in asked]
        for client in lost:
            opened.late.end(client, None)
        if lost:
            logger.warning("round %d goes on without clients %s", opened.number + 1, lost)

    def _needed_of(self, client: int) -> tuple[int, ...]:
        """Of a client's states that which each checkpoint speaks of.

        A node knows a state by the round in which its client began, and what was still on its way
        at a checkpoint is not the checkpoint's.
        """
        used = (self._used_at[number].get(client, 0) for number in self._needed)
        return tuple(dict.fromkeys(used))
