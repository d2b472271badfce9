"""What a cohort sends, taken in one update at a time."""

from __future__ import annotations

from collections.abc import Callable

from ..comm.state import State, join_groups, split_groups
from .mean import Aggregate
from .state import ClientUpdate, CohortMean, Refused


class Cohort:
    """The updates of a round.

    Args:
        like: names, shapes and dtypes of the updates.
        aggregate: how several states become one.
    """

    def __init__(self, like: State, aggregate: Callable[[State], Aggregate]) -> None:
        self._aggregate = aggregate
        self._updates = aggregate(like)
        self._extra: Aggregate | None = None
        self._examples = 0
        self._loss = 0.0
        self.count = 0
        self.refused: list[Refused] = []

    def add(self, update: ClientUpdate, weight: float) -> None:
        """Take in a client's update."""
        self._updates.add(update.update, weight)
        if update.extra:
            extra = join_groups(update.extra)
            self._extra = self._extra or self._aggregate(extra)
            self._extra.add(extra, weight)
        self._loss += update.train_loss * update.num_examples
        self._examples += update.num_examples
        self.count += 1

    def mean(self, population: int) -> CohortMean:
        """The means, and the share of the population that they are of."""
        extra = split_groups(self._extra.result()) if self._extra else {}
        return CohortMean(self._updates.result(), extra, self.count / population)

    @property
    def train_loss(self) -> float | None:
        """Mean over all examples; None if no update was used."""
        return self._loss / self._examples if self._examples else None
