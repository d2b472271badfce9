"""Jobs to the nodes of a round, and what they answer in time."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from ...federation.state import Refused
from .directory import FIRST_WAIT_S, LONGEST_WAIT_S, Directory, pulled, pushed

logger = logging.getLogger("flwr.fedpara")


@dataclass(frozen=True)
class Replies:
    """What came back in time.

    Attributes:
        content: by client, the first that its node answered.
        beside: clients that answered once more, or another message than they were sent.
    """

    content: dict[int, RecordDict] = field(default_factory=dict)
    beside: list[int] = field(default_factory=list)

    @property
    def refused(self) -> list[Refused]:
        """Answers of which nothing is used, in client order."""
        return [
            Refused(c, "duplicate", "it answered twice: the first update is used")
            if c in self.content
            else Refused(c, "stale", "it answers a message of another round")
            for c in sorted(self.beside)
        ]


@dataclass(frozen=True)
class Pending:
    """Messages that went out.

    Attributes:
        expected: client by the message's id.
        end: when the time to answer is up, by the monotonic clock.
    """

    expected: Mapping[str, int] = field(default_factory=dict)
    end: float = 0.0


def dispatch(
    grid: Grid, directory: Directory, jobs: Mapping[int, RecordDict], group: str, seconds: float
) -> Pending:
    """Send clients their jobs.

    Args:
        grid: the way to the nodes.
        directory: who is where.
        jobs: by client; those that are not connected get nothing.
        group: names the messages for Flower.
        seconds: time to answer in.
    """
    expected: dict[str, int] = {}
    end = time.monotonic() + seconds
    for client, job in jobs.items():
        if client in directory.nodes:
            node = directory.nodes[client]
            message = Message(job, node, MessageType.TRAIN, ttl=seconds, group_id=group)
            if sent := pushed(grid, message):
                expected[sent] = client
    return Pending(expected, end)


def collect(grid: Grid, directory: Directory, pending: Pending) -> Replies:
    """Collect answers until all have answered or time is up."""
    replies, pause = Replies(), FIRST_WAIT_S
    expected, end = pending.expected, pending.end
    silent = set(expected.values())
    while silent and time.monotonic() < end:
        # Flower answers with an error when it is asked again for what it has handed out.
        found = pulled(grid, [sent for sent, client in expected.items() if client in silent])
        for reply in found:
            silent.discard(take(reply, expected, directory, replies))
        directory.refresh()
        if silent and not found:
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, LONGEST_WAIT_S)
    return replies


def take(
    reply: Message, expected: Mapping[str, int], directory: Directory, replies: Replies
) -> int | None:
    """Sort a reply; the client that need not be waited for any longer."""
    facts = reply.metadata
    client = expected.get(facts.reply_to_message_id)
    if client is None:
        stranger = next((c for c, n in directory.nodes.items() if n == facts.src_node_id), None)
        logger.warning("node %d answers what it was not asked: refused", facts.src_node_id)
        if stranger is not None:
            replies.beside.append(stranger)
        return None
    if reply.has_error():
        logger.warning("client %d failed: %.2000s", client, reply.error.reason)
    elif client in replies.content:
        replies.beside.append(client)
    else:
        replies.content[client] = reply.content
    return client
