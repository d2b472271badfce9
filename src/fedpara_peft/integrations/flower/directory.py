"""Who is there: which node trains which client, and whether it was given the same run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from ...comm.errors import PayloadError
from ...federation.data.fingerprint import differences, shown_differences
from .messages import read_introduction

logger = logging.getLogger("flwr.fedpara")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 1.0


class Directory:
    """Which node trains which client; nodes may come and go.

    A node says once which client it has. While it is connected no other node can take its client.

    Args:
        grid: the way to the nodes.
        num_clients: the population.
        ttl_s: how long a question to a node is valid.
        expected: what every node must have been given, by name.

    Attributes:
        nodes: by client, the node that trains it.
        num_examples: by client, how many examples it has.
        unlike: by node, how what it was given differs; such a node trains nobody.
    """

    def __init__(
        self, grid: Grid, num_clients: int, ttl_s: float, expected: Mapping[str, Any]
    ) -> None:
        self._grid = grid
        self._num_clients = num_clients
        self._ttl_s = ttl_s
        self._expected = expected
        self._asked: dict[int, tuple[str, float]] = {}
        self._claims: dict[int, tuple[int, int]] = {}
        self.nodes: dict[int, int] = {}
        self.num_examples: dict[int, int] = {}
        self.unlike: dict[int, str] = {}

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
        end, pause = time.monotonic() + seconds, FIRST_WAIT_S
        while True:
            self.refresh()
            present = clients & self.nodes.keys()
            if present == clients or (present and not all):
                return True
            if time.monotonic() >= end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT_S)

    def _hear(self, node: int, reply: Message) -> None:
        if reply.has_error():
            logger.warning("node %d did not say who it is: %.500s", node, reply.error.reason)
            return
        try:
            client, num_examples, facts = read_introduction(reply.content)
            if client >= self._num_clients or num_examples < 1:
                raise PayloadError(
                    "not_sampled",
                    f"it has client {client} with {num_examples} examples, the run has clients "
                    f"0 to {self._num_clients - 1}: check partition-id and num_clients",
                )
        except PayloadError as error:
            logger.warning("node %d: %s", node, error)
            return
        if differing := differences(self._expected, facts):
            shown = shown_differences(differing, "here", "there")
            self.unlike[node] = f"node {node} (client {client}): {shown}"
            logger.warning("refused: %s", self.unlike[node])
            return
        self.unlike.pop(node, None)
        holder = next((n for n, (other, _) in self._claims.items() if other == client), None)
        if holder is not None:
            logger.warning(
                "node %d has client %d, whom node %d has, and waits until that one is gone: give "
                "each node a partition-id of its own",
                node, client, holder,
            )  # fmt: skip
        self._claims[node] = client, num_examples


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
