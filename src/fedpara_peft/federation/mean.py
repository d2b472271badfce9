"""How a cohort's updates become one: the mean, and means that a few bad clients cannot move."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..comm.state import State
from .errors import ArgumentsError


class Aggregate(ABC):
    """One state made of several, added in client order.

    Args:
        like: names, shapes and dtypes of the states.
    """

    @abstractmethod
    def __init__(self, like: State) -> None: ...

    @abstractmethod
    def add(self, state: State, weight: float) -> None:
        """Add a state."""

    @abstractmethod
    def result(self) -> State:
        """The aggregate of what was added; zero if nothing was."""


class WeightedMean(Aggregate):
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
        """See :class:`Aggregate`."""
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
        """See :class:`Aggregate`."""
        weight = self._weight or 1.0
        mean = {}
        for name, total in self._sums.items():
            part = total / weight
            like = self._like[name]
            mean[name] = (part if like.is_floating_point() else part.round()).to(like.dtype)
        return mean


class TrimmedMean(Aggregate):
    """The mean, entry by entry, without the largest and the smallest values (arXiv:1803.01498).

    The median is what is left where all others are cut. Weights do not count: a client could claim
    any. All states are held until the end.

    Args:
        like: names, shapes and dtypes of the states.
        share: of the states, cut at either end; in [0, 0.5].
    """

    def __init__(self, like: State, share: float) -> None:
        self._like = like
        self._share = share
        self._states: list[State] = []

    def add(self, state: State, weight: float) -> None:
        """See :class:`Aggregate`."""
        self._states.append(state)

    def result(self) -> State:
        """See :class:`Aggregate`."""
        count = len(self._states)
        cut = min(int(self._share * count + 1e-9), (count - 1) // 2)
        mean = {}
        for name, like in self._like.items():
            if not count:
                mean[name] = torch.zeros_like(like)
                continue
            values = torch.stack([s[name].to(_sum_dtype(like)) for s in self._states])
            middle = values.sort(0).values[cut : count - cut].mean(0)
            mean[name] = (middle if like.is_floating_point() else middle.round()).to(like.dtype)
        return mean


def aggregate_from_name(name: str) -> Callable[[State], Aggregate]:
    """The aggregate of a name: ``mean``, ``median`` or ``trimmed_mean:SHARE``.

    Raises:
        ArgumentsError: there is none of this name.
    """
    kind, _, value = name.partition(":")
    if name == "mean":
        return WeightedMean
    if name == "median":
        return functools.partial(TrimmedMean, share=0.5)
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if kind != "trimmed_mean" or not 0 <= share < 0.5:
        raise ArgumentsError(
            f"aggregation must be mean, median or trimmed_mean:SHARE with a share in [0, 0.5), got "
            f"{name!r}"
        )
    return functools.partial(TrimmedMean, share=share)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    if tensor.is_floating_point():
        return torch.promote_types(tensor.dtype, torch.float32)
    return torch.float64
