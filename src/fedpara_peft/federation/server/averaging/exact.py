"""The exact average: global weights that are the mean of clients' weights, all factors training.

The mean of factors is not the mean of weights. Beside every product a weight has a remainder R,
which the server moves by what the mean of factors misses,

    R_{t+1} = R_t + Σ_i p_i P(θ_i) - P(θ_t + Σ_i p_i (θ_i - θ_t)),

so that with FedAvg ``P(θ_{t+1}) + R_{t+1}`` is ``Σ_i p_i (P(θ_i) + R_t)``: FedEx-LoRA's residual
(arXiv:2410.09432) for products of products. Another server optimizer steps from that mean.

R is dense and is never sent as such while less will do: it is a sum of products of factors that the
server has received, its *terms*, from which every client makes the same numbers. A client is sent
the terms since its last update was used, or R where that is less. Terms are the clients' own
factors: they are no secret from one another, which is why noise for privacy is refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....comm.errors import PayloadError
from ....comm.payload import Format, Payload
from ....comm.schema import Schema, schema_of
from ....comm.state import State
from ....maths.compose import Half
from ....maths.precision import wide
from ....tuner.layer import FactorizedWeight, factorized_weights
from ...errors import ArgumentsError
from ...state import ServerState, Terms


@dataclass(frozen=True)
class _Product:
    """A weight's product as a function of a state.

    Attributes:
        found: the weight.
        factors: names of X, Y and T of each half.
    """

    found: FactorizedWeight
    factors: tuple[tuple[str | None, ...], ...]

    def of(self, state: State) -> Tensor:
        """P(θ) in the base layer's layout, in float64."""
        halves = [
            Half(*(None if n is None else wide(state[n]) for n in names))  # type: ignore[arg-type]
            for names in self.factors
        ]
        return self.found.layer.product(self.found.adapter, self.found.weight, halves, 1.0)


@dataclass(frozen=True)
class CatchUp:
    """What a client is sent beside w_t, so that its remainders become the server's.

    Attributes:
        since: the round of the remainders that terms are added to; at 0 they are zero.
        form: the payload's format; of an empty schema where nothing has moved them.
        rounds: by round, how many states its terms have; None where R itself is sent.
    """

    since: int
    form: Format
    rounds: Mapping[int, int] | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """What a client must know to read it: since, length in bytes, each round and its count."""
        pairs = (self.rounds or {}).items()
        return (self.since, len(self.form.size), *(n for pair in pairs for n in pair))

    def encode(self, server: ServerState) -> Payload:
        """The payload; nothing is sent for nothing."""
        if not self.form.schema:
            return Payload(b"")
        return self.form.encode(self._state(server), server.round)

    def decode(self, data: bytes, round: int) -> State | list[Terms]:
        """What was sent: remainders to take as they are, or terms to add to those that are there.

        Raises:
            PayloadError: it is not what was agreed on.
        """
        if not self.form.schema:
            return []
        state = self.form.decode(data, round)
        if self.rounds is None:
            return state
        return [
            Terms(
                number,
                tuple(state[f"{number}/weights"].tolist()),
                tuple(_under(state, f"{number}/{k}/") for k in range(count)),
            )
            for number, count in self.rounds.items()
        ]

    def _state(self, server: ServerState) -> State:
        if self.rounds is None:
            return {name: server.params[name] for name in server.remainders.names}
        found: State = {}
        for terms in server.remainders.terms:
            if terms.round in self.rounds:
                weights = torch.tensor(terms.weights, dtype=torch.float64)
                found[f"{terms.round}/weights"] = weights
                for k, state in enumerate(terms.states):
                    found |= {f"{terms.round}/{k}/{n}": t for n, t in state.items()}
        return found


class ExactAverage:
    """Moves the remainders of a model's weights.

    Args:
        model: with FedPara adapters whose weights have remainders.
        server: before the first round.

    Raises:
        ArgumentsError: the model has no such weights, or the server does not have all factors.
    """

    def __init__(self, model: nn.Module, server: ServerState) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self._products: dict[str, _Product] = {}
        for found in factorized_weights(model):
            factors = tuple(
                tuple(None if factor is None else names[id(factor)] for factor in half)
                for half in found.halves
            )
            self._products[found.remainder_name] = _Product(found, factors)
        self._factors = {
            n: server.params.get(n)
            for product in self._products.values()
            for half in product.factors
            for n in half
            if n is not None
        }
        missing = [n for n, tensor in self._factors.items() if tensor is None]
        if missing or not self._products:
            raise ArgumentsError(
                "exact_average needs FedPara adapters whose factors all train and are all sent"
                + (f"; {missing[0]} stays where it is" if missing else ", and the model has none")
                + ": leave exact_average out"
            )
        self._schema = schema_of({n: server.params[n] for n in self._factors})
        self._dense = schema_of({n: server.params[n] for n in self._products})
        self._device = server.params[next(iter(self._products))].device

    def after(
        self, before: ServerState, ended: ServerState, mean: State, taken: Mapping[int, State],
        weights: Sequence[float],
    ) -> ServerState:  # fmt: skip
        """The server after a round, with its remainders moved.

        Args:
            before: the round.
            ended: it, but for them.
            mean: the mean update.
            taken: by client, the factors that it ended with.
            weights: what each of them weighs, in the same order.
        """
        if not taken:
            return ended
        total = sum(weights)
        # What the factors' mean is in the server's own precision: it is what the server goes on to.
        middle = {n: before.params[n] + mean[n] for n in self._factors}
        shares = [weight / total for weight in weights]
        terms = Terms(before.round, (*shares, -1.0), (*taken.values(), middle))
        every = (*before.remainders.terms, terms)
        kept = self._worth_keeping(every)
        lost = every[: len(every) - len(kept)]
        found = dataclasses.replace(
            before.remainders,
            terms=kept,
            seen={**before.remainders.seen, **dict.fromkeys(taken, before.round)},
            complete_from=lost[-1].round + 1 if lost else before.remainders.complete_from,
        )
        params = {**ended.params, **self.moved(ended.params, terms)}
        return dataclasses.replace(ended, params=params, remainders=found)

    def moved(self, params: State, terms: Terms) -> State:
        """The remainders with terms added, R + Σ_k w_k P(θ_k); the same bits wherever it is done.

        Args:
            params: holds the remainders.
            terms: what to add.
        """
        found = {}
        with torch.no_grad():
            for name, product in self._products.items():
                total = wide(params[name])
                for weight, state in zip(terms.weights, terms.states, strict=True):
                    total = total.add(product.of(state), alpha=weight)
                found[name] = total.to(params[name].dtype).to(params[name].device)
        return found

    def own_factors(self, state: State) -> State:
        """The factors of a state."""
        return {n: state[n] for n in self._factors}

    def catch_up(self, server: ServerState, client: int, *, whole: bool = False) -> CatchUp:
        """What brings a client's remainders up to date; nothing to send where they are.

        Args:
            server: between two rounds.
            client: client index.
            whole: all of it, for a client that has lost what it had.
        """
        since = 0 if whole else server.remainders.seen.get(client, 0)
        kept = {terms.round: len(terms.states) for terms in server.remainders.terms}
        rounds = {number: count for number, count in kept.items() if number >= since}
        dense = self._format(None)
        if since < server.remainders.complete_from:
            return CatchUp(since, dense, None)
        # A round that nobody's update was used in has moved nothing, and has no terms.
        form = self._format(tuple(rounds.items()))
        if len(form.size) < len(dense.size):
            return CatchUp(since, form, rounds)
        return CatchUp(since, dense, None)

    def told(self, numbers: Sequence[int], round: int) -> CatchUp:
        """What the server means by :attr:`CatchUp.numbers`.

        Args:
            numbers: as they came.
            round: rounds completed.

        Raises:
            PayloadError: they are no such numbers.
        """
        since, size, *pairs = numbers if len(numbers) > 1 else (-1, 0)
        rounds = dict(zip(pairs[::2], pairs[1::2], strict=False))
        each = sum(entry.num_bytes for entry in self._schema.values())
        sound = 0 <= since <= round and 2 * len(rounds) == len(pairs)
        sound &= list(rounds) == sorted(n for n in rounds if since <= n < round)
        # Before a format is made of them: numbers that claim more than came cost nothing.
        if sound and sum(rounds.values()) * each <= size:
            dense = bool(size) and not rounds
            form = self._format(None if dense else tuple(rounds.items()))
            if len(form.size) == size:
                return CatchUp(since, form, None if dense else rounds)
        raise PayloadError(
            "malformed",
            f"the remainders' terms are told as {list(numbers)!r:.80} in round {round + 1}: run "
            "one version on both ends",
        )

    def followed(self, caught: CatchUp, data: bytes, round: int, own: State) -> State:
        """A client's remainders once it has what it was sent.

        Args:
            caught: what that is.
            data: the payload.
            round: rounds completed.
            own: its remainders as of ``caught.since``; empty: it has none.

        Raises:
            PayloadError: the payload is not what was agreed on, or the client has lost what it is
                to be added to.
        """
        found = caught.decode(data, round)
        if not isinstance(found, list):
            return self._placed(found)
        if not caught.since:
            own = {name: torch.zeros(e.shape, dtype=e.dtype) for name, e in self._dense.items()}
        elif schema_of(own) != self._dense:
            raise PayloadError(
                "behind",
                f"the client does not have the remainders of round {caught.since + 1}, in which "
                "its update was used: it needs them whole",
            )
        own = self._placed(own)
        for terms in found:
            states = tuple(map(self._placed, terms.states))
            own = self.moved(own, dataclasses.replace(terms, states=states))
        return own

    def _placed(self, state: State) -> State:
        return {name: tensor.to(self._device) for name, tensor in state.items()}

    @functools.lru_cache(maxsize=64)  # noqa: B019 (as long-lived as the run)
    def _format(self, rounds: tuple[tuple[int, int], ...] | None) -> Format:
        if rounds is None:
            return Format(self._dense)
        schema: Schema = {}
        for number, count in rounds:
            weights = torch.empty(count, dtype=torch.float64, device="meta")
            schema |= schema_of({f"{number}/weights": weights})
            for k in range(count):
                schema |= {f"{number}/{k}/{n}": entry for n, entry in self._schema.items()}
        return Format(schema)

    def _worth_keeping(self, terms: Sequence[Terms]) -> tuple[Terms, ...]:
        """The newest terms, as many as are less to send than the remainders."""
        room = sum(entry.num_bytes for entry in self._dense.values())
        each = sum(entry.num_bytes for entry in self._schema.values())
        kept: list[Terms] = []
        for one in reversed(terms):
            room -= each * len(one.states)
            if room < 0:
                break
            kept.insert(0, one)
        return tuple(kept)


def _under(state: State, prefix: str) -> State:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
