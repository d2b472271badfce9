"""What goes into a round and comes out of it, immutable; what is not here does not survive."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..comm.errors import Refusal
from ..comm.payload import PayloadSize
from ..comm.state import State


@dataclass(frozen=True)
class Terms:
    """What moved the remainders in a round: R ← R + Σ_k w_k P(θ_k).

    Attributes:
        round: rounds completed before it.
        weights: w_k.
        states: θ_k, the factors alone.
    """

    round: int
    weights: tuple[float, ...]
    states: tuple[State, ...]


@dataclass(frozen=True)
class Remainders:
    """The dense part of weights that the server moves; see ``server/averaging/exact.py``.

    Attributes:
        names: of the entries of the server's ``params`` that are remainders.
        terms: what moved them of late.
        seen: by client, the last round of which it has them for certain; 0 for others.
        complete_from: the first round of which, and of all later ones, ``terms`` has what moved.
    """

    names: frozenset[str] = frozenset()
    terms: tuple[Terms, ...] = ()
    seen: Mapping[int, int] = field(default_factory=dict)
    complete_from: int = 0


@dataclass(frozen=True)
class ServerState:
    """The server between two rounds.

    Attributes:
        round: rounds completed.
        params: the global state w_t.
        optimizer: what the strategy's server step keeps, by name.
        buffers: names of the entries of ``params`` that are buffers, not parameters.
        residual: what the downlink's codec has lost so far, with error feedback.
        noise_seed: of the noise of differential privacy, which protects while nobody knows it.
        remainders: of the entries of ``params`` that neither train nor travel as they are.
        clock_s: the simulated time, where clients' seconds are given.
        flights: clients that are still at work, where rounds do not wait for all.
        clip_norm: C_t, where it follows the updates' norms.
    """

    round: int
    params: State
    optimizer: Mapping[str, State] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    residual: State = field(default_factory=dict)
    noise_seed: int | None = None
    remainders: Remainders = field(default_factory=Remainders)
    clock_s: float = 0.0
    flights: tuple[Flight, ...] = ()
    clip_norm: float | None = None

    def restricted(self, names: Collection[str]) -> ServerState:
        """The part of the server that a round with these names works on."""
        return replace(
            self,
            params={n: t for n, t in self.params.items() if n in names},
            optimizer={
                group: {n: t for n, t in state.items() if n in names}
                for group, state in self.optimizer.items()
            },
        )

    def updated(self, part: ServerState) -> ServerState:
        """The whole server again, with what a round on a part of it changed."""
        groups = self.optimizer.keys() | part.optimizer.keys()
        optimizer = {
            group: {**self.optimizer.get(group, {}), **part.optimizer.get(group, {})}
            for group in sorted(groups)
        }
        params = {**self.params, **part.params}
        return replace(self, round=part.round, params=params, optimizer=optimizer)


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
    """

    local: State = field(default_factory=dict)
    strategy: Mapping[str, State] = field(default_factory=dict)
    residual: State = field(default_factory=dict)
    optimizer: Mapping[str, State] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.local or self.strategy or self.residual or self.optimizer)


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
    """

    client: int
    num_examples: int
    update: State
    train_loss: float
    extra: Mapping[str, State] = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    steps: LocalSteps | None = None
    clipped: bool = False


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


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        round: round number, counted from 1.
        cohort: the sampled clients, by name, as everywhere in a report; with ``buffer_size`` those
            whose turns ended in this round, whenever they began.
        dropped: those of them that did not report.
        refused: those whose update was not used, each with the reason.
        train_loss: mean over the clients that reported, by examples; None if none did.
        metrics: evaluation after the round, of the global model (``eval_…``) and over the clients'
            own models on their own data (``client_…_mean``, ``…_worst_decile``, ``…_std``; which
            tenth is the worst, :func:`~.data.metrics.higher_is_better` tells from the name); empty
            where none was made.
        client_metrics: every client's own numbers behind them, by metric and client; a client
            whose ``compute_metrics`` left a name out is not among its values, here or above.
        uplink_bytes: payloads from clients to the server.
        downlink_bytes: payloads from the server to clients.
        header_bytes: the part of both that is headers.
        averaging_bias: error of averaging factors instead of weights, relative to the mean update
            of the weights; None where it was not measured.
        epsilon: ε of differential privacy after this round; None without noise.
        clip_norm: what updates were clipped to, where it follows their norms.
        seconds: wall-clock time of the round, evaluation left out.
        slowest_client_s: training time of the slowest client that sent something, on the machine
            that simulated it (with the batched engine, an equal share of its stack's time); None
            where it was not measured.
        clock_s: the simulated time at its end, of a run with clients' seconds; None without.
        staleness_mean: mean over the updates that were used of the server's steps since they began;
            None where a round waits for its whole cohort, or used none.
        staleness_max: the most of them; likewise.
        local_steps: steps of the clients that sent something, together; None where nodes hide some.
        terms: what those steps' losses are means of, together: examples, or tokens that count.
        peak_memory_bytes: the most that this process, the main one, has held up to now: of the
            accelerator's memory, or without one of the machine's; None where it is not known.

    The last three are of the machine and the engine, so reports that differ in nothing else are
    equal.
    """

    round: int
    cohort: tuple[Any, ...]
    train_loss: float | None
    metrics: Mapping[str, float]
    uplink_bytes: int
    downlink_bytes: int
    header_bytes: int
    seconds: float
    dropped: tuple[Any, ...] = ()
    refused: tuple[tuple[Any, str], ...] = ()
    client_metrics: Mapping[str, Mapping[Any, float]] = field(default_factory=dict)
    averaging_bias: float | None = None
    epsilon: float | None = None
    clip_norm: float | None = None
    slowest_client_s: float | None = None
    clock_s: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None
    local_steps: int | None = field(default=None, compare=False)
    terms: float | None = field(default=None, compare=False)
    peak_memory_bytes: int | None = field(default=None, compare=False)

    @property
    def terms_per_s(self) -> float | None:
        """Examples, or tokens that count, trained on a second of the round's wall-clock time."""
        return None if self.terms is None or not self.seconds else self.terms / self.seconds


def placed_like(server: ServerState, like: State) -> ServerState:
    """A server state on the devices of the live tensors."""

    def placed(state: State) -> State:
        return {name: tensor.to(like[name].device) for name, tensor in state.items()}

    optimizer = {group: placed(state) for group, state in server.optimizer.items()}
    terms = tuple(
        replace(one, states=tuple(map(placed, one.states))) for one in server.remainders.terms
    )
    # The residual stays in main memory, where payloads are made.
    return replace(
        server,
        params=placed(server.params),
        optimizer=optimizer,
        remainders=replace(server.remainders, terms=terms),
    )
