"""The server between two rounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from ...comm.state import State
from .client import Flight


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
