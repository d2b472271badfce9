"""Messages between the server and its nodes: who is there, and who answers in time."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from ...comm.errors import PayloadError
from ...federation.state import Refused
from .messages import read_introduction

logger = logging.getLogger("flwr.fedpara")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 1.0


@dataclass(frozen=True)
class Replies:
    """What came back in time.

    Attributes:
        sent: clients to whom a message went out.
        content: by client, the first that its node answered.
        beside: clients that answered once more, or another message than they were sent.
    """

    sent: list[int] = field(default_factory=list)
    content: dict[int, RecordDict] = field(default_factory=dict)
    beside: list[int] = field(default_factory=list)

    @property
    def refused(self) -> list[Refused]:
        """Answers of which nothing is used, in client order."""
        return [
            Refused(c, "duplicate", f"client {c} answered twice: the first update is used")
            if c in self.content
            else Refused(c, "stale", f"client {c} answers a message of another round")
            for c in sorted(self.beside)
        ]


class Directory:
    """Which node trains which client; nodes may come and go.

    A node says once which client it has. While it is connected no other node can take its client.

    Args:
        grid: the way to the nodes.
        num_clients: the population.
        ttl_s: how long a question to a node is valid.
    """

    def __init__(self, grid: Grid, num_clients: int, ttl_s: float) -> None:
        self._grid = grid
        self._num_clients = num_clients
        self._ttl_s = ttl_s
        self._asked: dict[int, tuple[str, float]] = {}
        self.nodes: dict[int, int] = {}
        self.num_examples: dict[int, int] = {}

    def refresh(self) -> None:
        """Forget nodes that left, ask new ones who they are, and hear those that answer."""
        connected = set(self._grid.get_node_ids())
        self.nodes = {c: node for c, node in self.nodes.items() if node in connected}
        known, now = set(self.nodes.values()), time.monotonic()
        for node in sorted(connected - known):
            if node not in self._asked or now - self._asked[node][1] > self._ttl_s:
                question = Message(RecordDict(), node, MessageType.QUERY, ttl=self._ttl_s)
                if sent := pushed(self._grid, question):
                    self._asked[node] = (sent, now)
        waiting = {sent: node for node, (sent, _) in self._asked.items() if node not in known}
        for reply in pulled(self._grid, list(waiting)):
            node = waiting.get(reply.metadata.reply_to_message_id)
            if node is not None:
                self._hear(node, reply)

    def wait_for(self, clients: set[int], seconds: float, *, all: bool) -> bool:
        """Wait until all of these clients, or any, are there; whether they are."""
        end, pause = time.monotonic() + seconds, _FIRST_WAIT_S
        while True:
            self.refresh()
            present = clients & self.nodes.keys()
            if present == clients or (present and not all):
                return True
            if time.monotonic() >= end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT_S)

    def _hear(self, node: int, reply: Message) -> None:
        if reply.has_error():
            logger.warning("node %d did not say who it is: %.500s", node, reply.error.reason)
            return
        try:
            client, num_examples = read_introduction(reply.content)
            if client >= self._num_clients or num_examples < 1:
                raise PayloadError(
                    "not_sampled",
                    f"it has client {client} with {num_examples} examples, the run has clients "
                    f"0 to {self._num_clients - 1}: check partition-id and num_clients",
                )
            if client in self.nodes:
                raise PayloadError(
                    "duplicate",
                    f"it has client {client}, whom node {self.nodes[client]} has: give each node a "
                    "partition-id of its own",
                )
        except PayloadError as error:
            logger.warning("node %d: %s", node, error)
            return
        self.nodes[client], self.num_examples[client] = node, num_examples


def exchange(
    grid: Grid, directory: Directory, jobs: Mapping[int, RecordDict], group: str, seconds: float
) -> Replies:
    """Send clients their jobs and collect answers until all have answered or time is up.

    Args:
        grid: the way to the nodes.
        directory: who is where.
        jobs: by client; those that are not connected get nothing.
        group: names the messages for Flower.
        seconds: time to answer in.
    """
    replies = Replies()
    expected: dict[str, int] = {}
    end, pause = time.monotonic() + seconds, _FIRST_WAIT_S
    for client, job in jobs.items():
        if client in directory.nodes:
            node = directory.nodes[client]
            message = Message(job, node, MessageType.TRAIN, ttl=seconds, group_id=group)
            if sent := pushed(grid, message):
                expected[sent] = client
                replies.sent.append(client)
    silent = set(expected.values())
    while silent and time.monotonic() < end:
        found = pulled(grid, list(expected))
        for reply in found:
            silent.discard(_take(reply, expected, directory, replies))
        directory.refresh()
        if silent and not found:
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, _LONGEST_WAIT_S)
    return replies


def _take(
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


def pushed(grid: Grid, message: Message) -> str | None:
    """Send a message; its id, None if Flower does not take it.

    One at a time: Flower refuses requests that are too long, and shares the payload all the same.
    """
    sent = list(grid.push_messages([message]))
    if not sent or not sent[0]:
        logger.warning("no message could be sent to node %d", message.metadata.dst_node_id)
        return None
    return str(sent[0])


def pulled(grid: Grid, sent: list[str]) -> list[Any]:
    """What has been answered so far."""
    return list(grid.pull_messages(sent)) if sent else []
