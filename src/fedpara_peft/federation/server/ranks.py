"""Clients that train only the first columns of the factors: each at a rank that it can afford.

Of a factorized weight of inner rank r a client of rank rᵢ has the first rᵢ columns of every X and Y
(and the first rᵢ × rᵢ block of a core T), in the global halves and in its own. That is all that it
is sent, trains, sends and computes with: its ΔW is that of rank rᵢ, at the global scale alpha / r.
In memory the columns that it lacks are zero, which is the same and stays so (see
:mod:`~fedpara_peft.tuner.ranks`).

The server takes every column's mean over the clients that sent it,

    Δ[:, j] = Σ_{i: rᵢ > j} pᵢ Δᵢ[:, j] / Σ_{i: rᵢ > j} pᵢ,

so that no client that lacks a column pulls it towards zero. A column that nobody sent stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from ...comm.codecs import as_codec
from ...comm.state import State
from ...tuner.ranks import Columns, factor_columns
from ..arguments import FederatedArguments
from ..errors import ArgumentsError, about
from ..state import Broadcast, ClientState, ServerState
from ..strategies import Strategy
from .mean import Aggregate, ByColumn, Where

#: A number of columns, at most a weight's own, or a share of them in (0, 1].
Rank = int | float
#: Every client's: by name, in order, or as a function of its name.
GivenRanks = Mapping[Any, Rank] | Sequence[Rank] | Callable[[Any], Rank]
#: A client's rank as states are cut by it; None: it has every column.
Level = int | float | None


class ClientRanks:
    """Which columns each client has.

    Args:
        columns: of the factors, by name; none: every client has everything.
        rank_of: from a client's index to its rank.
    """

    def __init__(
        self,
        columns: Mapping[str, Columns] | None = None,
        rank_of: Callable[[int], Rank] | None = None,
    ) -> None:
        self._columns = dict(columns or {})
        self._rank_of = rank_of
        self._levels: dict[int, Level] = {}

    def level(self, client: int) -> Level:
        """A client's rank; None if it has every column.

        Raises:
            ArgumentsError: what was given for it is no rank.
        """
        if self._rank_of is None:
            return None
        if client not in self._levels:
            self._levels[client] = self._level(self._rank_of(client))
        return self._levels[client]

    def cut(self, state: State, level: Level) -> State:
        """The part of a state that such a client has; names that are no factors are left whole."""
        return state if level is None else {n: t[self._own(n, level)] for n, t in state.items()}

    def padded(self, part: State, level: Level) -> State:
        """A state of full shapes, zero where :meth:`cut` left something out."""
        if level is None:
            return part
        found = {}
        for name, tensor in part.items():
            found[name] = tensor
            if name in self._columns:
                shape, columns = list(tensor.shape), self._columns[name]
                for dim in columns.dims:
                    shape[dim] = columns.r
                found[name] = tensor.new_zeros(shape)
                found[name][self._own(name, level)] = tensor
        return found

    def only(self, state: State, level: Level) -> State:
        """A state of full shapes, zero beyond what such a client has."""
        return self.padded(self.cut(state, level), level)

    def seen(self, broadcast: Broadcast, level: Level) -> Broadcast:
        """A broadcast as such a client receives it, in full shapes."""
        extra = self.padded_each(self.cut_each(broadcast.extra, level), level)
        return Broadcast(self.only(broadcast.params, level), extra)

    def cut_each(self, groups: Mapping[str, State], level: Level) -> dict[str, State]:
        """:meth:`cut` of every group of a strategy's."""
        return {group: self.cut(state, level) for group, state in groups.items()}

    def padded_each(self, groups: Mapping[str, State], level: Level) -> dict[str, State]:
        """:meth:`padded` of every group of a strategy's."""
        return {group: self.padded(state, level) for group, state in groups.items()}

    def own(self, state: ClientState | None, first_local: State, client: int) -> ClientState | None:
        """What a client keeps, of its rank.

        Args:
            state: what it kept; None: it has never trained.
            first_local: the local tensors of such a client, of all columns.
            client: client index.
        """
        level = self.level(client)
        if level is None:
            return state
        state = ClientState(local=first_local) if state is None else state
        local, residual = self.only(state.local, level), self.only(state.residual, level)
        return dataclasses.replace(state, local=local, residual=residual)

    def require_cut(self, update: State, level: Level) -> None:
        """Raise unless an update is zero beyond what such a client has.

        Raises:
            ArgumentsError: it is not.
        """
        if level is None:
            return
        for name in update.keys() & self._columns.keys():
            beyond = update[name].clone()
            beyond[self._own(name, level)] = 0
            if beyond.any():
                raise ArgumentsError(
                    f"{name} moved beyond its client's rank, where its gradient is zero: client "
                    "ranks need an optimizer and a loss that leave such entries alone"
                )

    def aggregate(
        self, like: State, levels: Collection[Level], base: Callable[[State], Aggregate]
    ) -> Aggregate:
        """An aggregate of the states that clients of these ranks send, each cut to its rank."""
        if all(level is None for level in levels):
            return base(like)
        return ByColumn(like, self._regions(like, levels), base)

    def with_resting(
        self, after: ServerState, before: ServerState, levels: Collection[Level]
    ) -> ServerState:
        """A server after its step, but with the columns that nobody sent as they were before it.

        A server optimizer with momentum would go on moving them. What it begins to keep of a factor
        in this very round has no value before, and is as it made it from an update of zero.

        Args:
            after: the step's result.
            before: what it started from.
            levels: ranks of the clients whose updates were used.
        """
        if not levels or None in levels:
            return after

        def rested(new: State, old: State) -> State:
            return {
                n: self._rested(n, t, old[n], levels) if n in old else t for n, t in new.items()
            }

        optimizer = {
            group: rested(state, before.optimizer.get(group, {}))
            for group, state in after.optimizer.items()
        }
        return dataclasses.replace(
            after, params=rested(after.params, before.params), optimizer=optimizer
        )

    def facts(self, clients: Sequence[int]) -> dict[str, Any]:
        """What a resumed run must have in common; nothing where all have every column."""
        levels = [self.level(client) for client in clients]
        return {} if all(level is None for level in levels) else {"client_ranks": levels}

    def _level(self, rank: Rank) -> Level:
        whole = all(self._count(name, rank) == c.r for name, c in self._columns.items())
        return None if whole else rank

    def _count(self, name: str, level: Level) -> int:
        r = self._columns[name].r
        if level is None:
            return r
        return min(level, r) if isinstance(level, int) else max(1, math.ceil(level * r - 1e-9))

    def _own(self, name: str, level: Level) -> Where:
        """The entries of a tensor that such a client has."""
        if name not in self._columns:
            return ()
        return _leading(self._columns[name].dims, self._count(name, level))

    def _rested(self, name: str, new: Tensor, old: Tensor, levels: Collection[Level]) -> Tensor:
        if name not in self._columns:
            return new
        moved = _leading(
            self._columns[name].dims, max(self._count(name, level) for level in levels)
        )
        whole = old.clone()
        whole[moved] = new[moved]
        return whole

    def _regions(
        self, like: State, levels: Collection[Level]
    ) -> dict[frozenset[Level], list[tuple[str, Where]]]:
        """Disjoint parts of all tensors, by who has them."""
        everybody = frozenset(levels)
        found: dict[frozenset[Level], list[tuple[str, Where]]] = {}
        for name in like:
            if name not in self._columns:
                found.setdefault(everybody, []).append((name, ()))
                continue
            dims, r = self._columns[name].dims, self._columns[name].r
            start = 0
            for end in sorted({*(self._count(name, level) for level in levels), r}):
                who = frozenset(level for level in levels if self._count(name, level) >= end)
                new = found.setdefault(who, [])
                # Of a core: a new row block up to the end, and the new columns above it.
                block: list[slice] = [slice(None)] * (dims[0] + 1)
                block[dims[0]] = slice(start, end)
                if len(dims) == 1:
                    new.append((name, tuple(block)))
                else:
                    new.append((name, (slice(start, end), slice(0, end))))
                    if start:
                        new.append((name, (slice(0, start), slice(start, end))))
                start = end
        return found


def ranks_of(
    model: nn.Module,
    args: FederatedArguments,
    strategy: Strategy,
    given: GivenRanks | None,
    names: Sequence[Any] | None,
) -> ClientRanks:
    """The ranks of a run's clients.

    Args:
        model: the global model.
        args: the run's settings.
        strategy: the federated optimizer.
        given: every client's rank, by name, in order, or as a function of the name; None, and a
            name that a mapping lacks: all columns.
        names: the clients' names; None on a node, where a client's index is its name and the
            population is not known.

    Raises:
        ArgumentsError: they are no ranks, or the run cannot have clients of different ranks.
    """
    if given is None:
        return ClientRanks()
    columns = _trained(factor_columns(model))
    _require_possible(columns, args, strategy)
    if names is not None:
        _require_known(given, names)

    def rank_of(client: int) -> Rank:
        name = client if names is None else names[client]
        with about(name):
            if callable(given):
                return _checked(given(name))
            return _checked(given.get(name, 1.0) if isinstance(given, Mapping) else given[client])

    return ClientRanks(columns, rank_of)


def _checked(rank: Any) -> Rank:
    if isinstance(rank, Integral) and not isinstance(rank, bool) and int(rank) >= 1:
        return int(rank)
    if isinstance(rank, float) and 0 < rank <= 1:
        return float(rank)
    raise ArgumentsError(
        f"{rank!r:.80} is no rank: give a number of columns of at least 1, or a share of every "
        "weight's columns in (0, 1]"
    )


def _require_known(given: GivenRanks, names: Sequence[Any]) -> None:
    """Raise unless ranks are of these clients."""
    if isinstance(given, Mapping):
        if unknown := given.keys() - set(names):
            raise ArgumentsError(
                f"client_ranks has {sorted(unknown, key=str)[:3]}, which are no clients: the run "
                f"has {list(names[:3])} and so on"
            )
    elif not callable(given) and len(given) != len(names):
        raise ArgumentsError(
            f"client_ranks has {len(given)} ranks for {len(names)} clients: give one a client, a "
            "mapping by name, or a function of the name"
        )


def _trained(columns: Mapping[str, Columns]) -> dict[str, Columns]:
    """The factors of the weights of which any trains; others are everybody's."""
    weights = {c.weight for c in columns.values() if c.trains}
    return {name: c for name, c in columns.items() if c.weight in weights}


def _require_possible(
    columns: Mapping[str, Columns], args: FederatedArguments, strategy: Strategy
) -> None:
    found = ""
    if not columns:
        found = "a model without trainable FedPara adapters"
    elif any(c.base_weight == "seeded" for c in columns.values()):
        found = (
            "base_weight='seeded': the base has P(θ₀) of all columns taken off, and a client "
            "without some of them would not start where the others do"
        )
    elif not all(c.trains for c in columns.values()):
        found = "factors that do not train beside others that do: they would be no zeros"
    elif not strategy.ranks_may_differ:
        found = (
            f"{type(strategy).__name__}: it does not say that its algebra holds entry by entry "
            "where clients lack entries (class attribute ranks_may_differ)"
        )
    elif args.dp_noise_multiplier:
        found = "dp_noise_multiplier: a column's divisor would tell who sent it"
    elif args.report_averaging_bias:
        found = "report_averaging_bias: the clients' weights have no common mean"
    elif args.error_feedback and not as_codec(args.downlink_codec).lossless:
        found = (
            f"error_feedback with downlink_codec={str(args.downlink_codec)!r}: every rank loses "
            "something else"
        )
    if found:
        raise ArgumentsError(f"client_ranks cannot have {found}; change that, or leave it out")


def _leading(dims: tuple[int, ...], count: int) -> Where:
    """The first entries along some of the first dimensions."""
    return tuple(slice(count) if d in dims else slice(None) for d in range(max(dims) + 1))
