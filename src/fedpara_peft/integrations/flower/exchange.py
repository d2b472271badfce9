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
        self._claims: dict[int, tuple[int, int]] = {}
        self.nodes: dict[int, int] = {}
        self.num_examples: dict[int, int] = {}

    def refresh(self) -> None:
        """Forget nodes that left, ask new ones who they are, and hear those that answer."""
        connected, now = set(self._grid.get_node_ids()), time.monotonic()
        self._claims = {node: claim for node, claim in self._claims.items() if node in connected}
        self._asked = {
            node: (sent, when)
            for node, (sent, when) in self._asked.items()
            if node in connected and now - when < self._ttl_s
        }
        for node in sorted(connected - self._claims.keys() - self._asked.keys()):
            question = Message(RecordDict(), node, MessageType.QUERY, ttl=self._ttl_s)
            self._asked[node] = (pushed(self._grid, question) or "", now)
        waiting = {sent: node for node, (sent, _) in self._asked.items() if sent}
        for reply in pulled(self._grid, list(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                self._asked[node] = ("", now)
                self._hear(node, reply)
        self.nodes = {}
        for node, (client, num_examples) in self._claims.items():  # who came first
            if client not in self.nodes:
                self.nodes[client], self.num_examples[client] = node, num_examples

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
        except PayloadError as error:
            logger.warning("node %d: %s", node, error)
            return
        holder = next((n for n, (other, _) in self._claims.items() if other == client), None)
        if holder is not None:
            logger.warning(
                "node %d has client %d, whom node %d has, and waits until that one is gone: give "
                "each node a partition-id of its own",
                node, client, holder,
            )  # fmt: skip
        self._claims[node] = client, num_examples


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
        # Flower answers with an error when it is asked again for what it has handed out.
        found = pulled(grid, [sent for sent, client in expected.items() if client in silent])
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
