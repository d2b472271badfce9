"""What a cohort sends, taken in one update at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

from ...comm.ledger import Direction
from ...comm.payload import PayloadSize
from ...comm.state import State
from ..state import ClientUpdate, CohortMean, Refused
from .mean import Aggregate
from .ranks import ClientRanks, Level


class Cohort:
    """The updates of a round.

    Args:
        like: names, shapes and dtypes of the updates.
        buffers: likewise of the buffers.
        groups: what the strategy sends beside an update, each group with its names.
        aggregate: how several states become one.
        keep: whether the single updates are kept until the end, beside what they are summed to.
        ranks: which columns each client has; all by default.
        levels: the ranks of the clients that may send something.

    Attributes:
        count: updates taken in.
        within: of them, those that were not clipped.
        levels: the ranks of their clients.
        refused: updates that are not used.
        beside: client, direction and length of what travelled beside broadcast and updates.
    """

    def __init__(
        self,
        like: State,
        buffers: State,
        groups: Sequence[str],
        aggregate: Callable[[State], Aggregate],
        keep: bool = False,
        ranks: ClientRanks | None = None,
        levels: Collection[Level] = (None,),
    ) -> None:
        self._ranks = ranks or ClientRanks()
        self._updates = self._ranks.aggregate(like, levels, aggregate)
        self._buffers = aggregate(buffers)
        self._extra = {g: self._ranks.aggregate(like, levels, aggregate) for g in groups}
        self._examples = 0.0
        self._loss = 0.0
        self._keep = keep
        self._kept: list[tuple[ClientUpdate, float]] = []
        self.count = self.within = 0
        self.levels: set[Level] = set()
        self.refused: list[Refused] = []
        self.beside: list[tuple[int, Direction, PayloadSize]] = []

    def add(self, update: ClientUpdate, weight: float, discount: float = 1.0) -> None:
        """Take in a client's update.

        Args:
            update: the client's.
            weight: of it in the means.
            discount: of a late one: what is a change is scaled by it, and buffers, which are
                states, weigh so much less.
        """
        level = self._ranks.level(update.client)
        if discount != 1:
            update = _scaled(update, discount)
        self._updates.add(self._ranks.cut(update.update, level), weight)
        self._buffers.add(update.buffers, weight * discount)
        for group, state in update.extra.items():
            self._extra[group].add(self._ranks.cut(state, level), weight)
        self.levels.add(level)
        self._loss += update.train_loss * update.size
        self._examples += update.size
        self.count += 1
        self.within += not update.clipped
        if self._keep:
            self._kept.append((dataclasses.replace(update, buffers={}), weight))

    def take_mean(self, mean: State, weight: float, count: int, train_loss: float) -> None:
        """Take in the mean of all updates at once, where no single one is seen.

        Args:
            mean: of the parameters.
            weight: of the updates, all together.
            count: updates that it is of.
            train_loss: their mean by weight.
        """
        self._updates.add(mean, 1.0)
        self.levels.add(None)
        self._loss, self._examples, self.count = train_loss * weight, weight, count

    def mean(self, population: int) -> CohortMean:
        """The means, and the share of the population that they are of."""
        extra = {group: aggregate.result() for group, aggregate in self._extra.items()}
        total = sum(weight for _, weight in self._kept)
        return CohortMean(
            self._updates.result(),
            extra,
            self.count / population,
            tuple(update for update, _ in self._kept),
            tuple(weight / total for _, weight in self._kept),
        )

    def buffers(self) -> State:
        """The means of the buffers; empty if no update was used."""
        return self._buffers.result() if self.count else {}

    @property
    def train_loss(self) -> float | None:
        """Mean over all examples; None if no update was used."""
        return self._loss / self._examples if self._examples else None


def _scaled(update: ClientUpdate, factor: float) -> ClientUpdate:
    def of(state: State) -> State:
        return {name: tensor * factor for name, tensor in state.items()}

    extra = {group: of(state) for group, state in update.extra.items()}
    return dataclasses.replace(update, update=of(update.update), extra=extra)
