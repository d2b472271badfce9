"""What goes into a round and comes out of it, immutable; what is not here does not survive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..comm.state import State


@dataclass(frozen=True)
class ServerState:
    """The server between two rounds.

    Attributes:
        round: rounds completed.
        params: the global state w_t.
        optimizer: what the strategy's server step keeps, by name.
        buffers: names of the entries of ``params`` that are buffers, not parameters.
    """

    round: int
    params: State
    optimizer: Mapping[str, State] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends.

    Attributes:
        client: client index i.
        num_examples: its examples, the weight of its update in the mean.
        update: local minus broadcast.
        train_loss: mean loss over its local steps.
    """

    client: int
    num_examples: int
    update: Mapping[str, Tensor]
    train_loss: float


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        round: round number, counted from 1.
        cohort: the sampled clients.
        train_loss: mean over the cohort, by examples.
        metrics: evaluation of the global model after the round; empty where none was made.
        uplink_bytes: payloads from clients to the server.
        downlink_bytes: payloads from the server to clients.
        header_bytes: the part of both that is headers.
        seconds: wall-clock time of the round, evaluation left out.
    """

    round: int
    cohort: tuple[int, ...]
    train_loss: float
    metrics: Mapping[str, float]
    uplink_bytes: int
    downlink_bytes: int
    header_bytes: int
    seconds: float
