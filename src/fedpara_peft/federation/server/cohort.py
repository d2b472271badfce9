"""What a cohort sends, taken in one update at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ...comm.state import State, join_groups, split_groups
from ..state import ClientUpdate, CohortMean, Refused
from .mean import Aggregate


class Cohort:
    """The updates of a round.

    Args:
        like: names, shapes and dtypes of the updates.
        buffers: likewise of the buffers.
        groups: what the strategy sends beside an update, each group with its names.
        aggregate: how several states become one.
        keep: whether the single updates are kept until the end, beside what they are summed to.
    """

    def __init__(
        self,
        like: State,
        buffers: State,
        groups: Sequence[str],
        aggregate: Callable[[State], Aggregate],
        keep: bool = False,
    ) -> None:
        self._updates = aggregate(like)
        self._buffers = aggregate(buffers)
        self._extra = aggregate(join_groups(dict.fromkeys(groups, like)))
        self._groups = groups
        self._examples = 0
        self._loss = 0.0
        self._keep = keep
        self._kept: list[tuple[ClientUpdate, float]] = []
        self.count = 0
        self.refused: list[Refused] = []

    def add(self, update: ClientUpdate, weight: float) -> None:
        """Take in a client's update."""
        self._updates.add(update.update, weight)
        self._buffers.add(update.buffers, weight)
        self._extra.add(join_groups(update.extra), weight)
        self._loss += update.train_loss * update.num_examples
        self._examples += update.num_examples
        self.count += 1
        if self._keep:
            self._kept.append((dataclasses.replace(update, buffers={}), weight))

    def mean(self, population: int) -> CohortMean:
        """The means, and the share of the population that they are of."""
        extra: dict[str, State] = {group: {} for group in self._groups} | split_groups(
            self._extra.result()
        )
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
