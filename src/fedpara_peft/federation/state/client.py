"""What a client receives, keeps and sends, and how its turn ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...comm.errors import Refusal
from ...comm.payload import PayloadSize
from ...comm.state import State


@dataclass(frozen=True)
class Broadcast:
    """What a client receives.

    Attributes:
        params: w_t.
        extra: what the strategy sends beside it, by name.
        clip_norm: to which the update will be clipped, where that follows the updates' norms.
    """

    params: State
    extra: Mapping[str, State] = field(default_factory=dict)
    clip_norm: float | None = None


@dataclass(frozen=True)
class ClientState:
    """What a client keeps between its rounds; it never travels.

    Attributes:
        local: its tensors of local scope.
        strategy: what the strategy keeps for it, by name.
        residual: what the uplink's codec has lost so far, with error feedback.
        optimizer: what ``optimizer_state="keep"`` keeps of its optimizer, by torch's names.
        remainders: the server's, as of the round in which it trained; on a node, which is sent
            only what has moved them since.
    """

    local: State = field(default_factory=dict)
    strategy: Mapping[str, State] = field(default_factory=dict)
    residual: State = field(default_factory=dict)
    optimizer: Mapping[str, State] = field(default_factory=dict)
    remainders: State = field(default_factory=dict)

    def __bool__(self) -> bool:
        kept = (self.local, self.strategy, self.residual, self.optimizer, self.remainders)
        return any(map(bool, kept))


@dataclass(frozen=True)
class LocalSteps:
    """How a client trained.

        w_t - y = η Σ_k a_k g_k

    with g_k the gradients of its steps, corrected, and what weight decay adds to them. SGD has
    a_k = 1; momentum β lets a gradient act on later steps, too, and a clipped gradient counts less.

    Attributes:
        count: its optimizer steps K.
        learning_rate: their learning rate η.
        weight: Σ_k a_k, K for plain SGD; None if its optimizer's steps are no such sum.
    """

    count: int
    learning_rate: float
    weight: float | None = None


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends.

    Attributes:
        client: client index i.
        num_examples: its examples.
        update: local minus broadcast, of the parameters.
        train_loss: mean loss over its local steps.
        extra: what the strategy sends beside it, by name.
        buffers: the buffers as they are, for not all of them have a difference.
        steps: how it trained; None where the strategy does not ask for it.
        clipped: whether it was longer than it may be, and is as the server scaled it.
        terms: of how many terms its losses were the means, together: examples, or tokens that
            count; None where clients do not weigh so much.
    """

    client: int
    num_examples: int
    update: State
    train_loss: float
    extra: Mapping[str, State] = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    steps: LocalSteps | None = None
    clipped: bool = False
    terms: float | None = None

    @property
    def size(self) -> float:
        """What it has trained on: terms where clients weigh so much, its examples elsewhere."""
        return float(self.num_examples) if self.terms is None else self.terms


@dataclass(frozen=True)
class Refused:
    """A client whose update is not used.

    Attributes:
        client: client index i.
        reason: which check refused it.
        message: what was found, and what helps; the server puts the client's name before it.
        error: the exception that a client met in its own training, in this process.
    """

    client: int
    reason: Refusal
    message: str
    error: Exception | None = None


@dataclass(frozen=True)
class Outcome:
    """How a client's turn ended.

    Attributes:
        client: client index i.
        size: length of what it sent; None if it sent nothing.
        update: what the server uses of it.
        refused: why it uses nothing.
        keeps_state: whether a new state of the client was stored.
        seconds: how long it trained; of clients in a stack, an equal share of the stack's time.
        payload: what it sent, in bytes, where they were asked for.
        sent: what it sent, also where the server uses nothing of it.
        reported: whether it answered at all; False for a stray message of a silent client.
        steps: its local steps; None where it does not tell.
        terms: the terms of their losses: examples, or tokens that count; likewise.
    """

    client: int
    size: PayloadSize | None = None
    update: ClientUpdate | None = None
    refused: Refused | None = None
    keeps_state: bool = False
    seconds: float | None = 0.0
    payload: bytes = b""
    sent: ClientUpdate | None = None
    reported: bool = True
    steps: int | None = None
    terms: float | None = None


@dataclass(frozen=True)
class Flight:
    """A client's turn that began in one round and may end in another.

    In a simulation it has been trained when it began, and comes to light when it ends.

    Attributes:
        client: client index i.
        start: rounds completed when it began: the version of the server that it trains from.
        finish_s: when it ends, by the simulated clock.
        outcome: how it ends; None: it does not report, or nobody knows yet.
        state: what the client keeps if its update is used.
    """

    client: int
    start: int
    finish_s: float = 0.0
    outcome: Outcome | None = None
    state: ClientState | None = None


@dataclass(frozen=True)
class CohortMean:
    """What a cohort sent, averaged.

    Attributes:
        update: mean update Δ of the parameters.
        extra: means of what the strategy sends beside it.
        share: clients whose updates it is of, of the population; with noise those expected.
        updates: the single updates in client order, as the server uses them: decoded and clipped;
            for strategies with ``sees_updates``, of the others empty.
        weights: what each of them weighs in the mean, 1 together.
    """

    update: State
    extra: Mapping[str, State] = field(default_factory=dict)
    share: float = 1.0
    updates: tuple[ClientUpdate, ...] = ()
    weights: tuple[float, ...] = ()
