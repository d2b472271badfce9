"""The cohort's mean: one definition, whoever computed what."""

from __future__ import annotations

import torch
from torch import Tensor

from ..comm.state import State, join_groups, split_groups
from .state import ClientUpdate, CohortMean


class WeightedMean:
    """A weighted mean of states, summed in the order in which they are added.

        Σ_i p_i s_i / Σ_i p_i

    Adding in client order makes the result independent of which process trained which client.
    Sums are formed in float32 at least; integers (counters of norm layers) in float64, rounded.

    Args:
        like: names, shapes and dtypes of the states.
    """

    def __init__(self, like: State) -> None:
        self._like = like
        self._weight = 0.0
        self._floats = [n for n, t in like.items() if t.is_floating_point()]
        self._sums = {n: torch.zeros_like(t, dtype=_sum_dtype(t)) for n, t in like.items()}
        self._float_sums = [self._sums[n] for n in self._floats]
        self._narrow = any(like[n].dtype != self._sums[n].dtype for n in self._floats)

    def add(self, state: State, weight: float) -> None:
        """Add a state."""
        self._weight += weight
        parts = [state[n] for n in self._floats]
        if self._narrow:
            parts = [p.to(s.dtype) for p, s in zip(parts, self._float_sums, strict=True)]
        if parts:
            torch._foreach_add_(self._float_sums, parts, alpha=weight)
        for name, total in self._sums.items():
            if not self._like[name].is_floating_point():
                total.add_(state[name].double(), alpha=weight)

    def result(self) -> State:
        """The mean of what was added; zero if nothing was."""
        weight = self._weight or 1.0
        mean = {}
        for name, total in self._sums.items():
            part = total / weight
            like = self._like[name]
            mean[name] = (part if like.is_floating_point() else part.round()).to(like.dtype)
        return mean


class CohortSums:
    """Running means of what a cohort sends.

    Args:
        like: names, shapes and dtypes of the updates.
    """

    def __init__(self, like: State) -> None:
        self._updates = WeightedMean(like)
        self._extra: WeightedMean | None = None
        self._count = self._examples = 0
        self._loss = 0.0

    def add(self, update: ClientUpdate, weight: float) -> None:
        """Take in a client's update."""
        self._updates.add(update.update, weight)
        if update.extra:
            extra = join_groups(update.extra)
            self._extra = self._extra or WeightedMean(extra)
            self._extra.add(extra, weight)
        self._loss += update.train_loss * update.num_examples
        self._examples += update.num_examples
        self._count += 1

    def mean(self, population: int) -> CohortMean:
        """The means, and the share of the population that they are of."""
        extra = split_groups(self._extra.result()) if self._extra else {}
        return CohortMean(self._updates.result(), extra, self._count / population)

    def loss(self) -> float | None:
        """Mean over all examples; None if no client reported."""
        return self._loss / self._examples if self._examples else None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    if tensor.is_floating_point():
        return torch.promote_types(tensor.dtype, torch.float32)
    return torch.float64
