"""How a cohort's updates become one: the mean, and means that a few bad clients cannot move."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...comm.state import State
from ...maths.precision import wide
from ..errors import ArgumentsError

#: A part of a tensor.
Where = tuple[slice, ...]


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
    Sums are formed in float32 at least (complex64), those of integers (counters of norm layers) and
    truth values in float64 and rounded: what more than half of the weight says is true.

    Args:
        like: names, shapes and dtypes of the states.
    """

    def __init__(self, like: State) -> None:
        self._like = like
        self._weight = 0.0
        self._sums = {n: torch.zeros_like(_summand(t)) for n, t in like.items()}
        self._narrow = any(t.dtype != self._sums[n].dtype for n, t in like.items())

    def add(self, state: State, weight: float) -> None:
        """See :class:`Aggregate`."""
        self._weight += weight
        sums, parts = list(self._sums.values()), [state[n] for n in self._sums]
        if self._narrow:
            parts = [_summand(p) for p in parts]
        if parts:
            torch._foreach_add_(sums, parts, alpha=weight)

    def result(self) -> State:
        """See :class:`Aggregate`."""
        weight = self._weight or 1.0
        return {n: _like(total / weight, self._like[n]) for n, total in self._sums.items()}


class TrimmedMean(Aggregate):
    """The mean, entry by entry, without the largest and the smallest values (arXiv:1803.01498).

    The median is what is left where all others are cut. Weights do not count: a client could claim
    any. All states are held until the end. Real and imaginary parts are entries of their own.

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
        if not self._states:
            return {n: torch.zeros_like(like) for n, like in self._like.items()}
        return {n: _like(self._middle(n, like), like) for n, like in self._like.items()}

    def _middle(self, name: str, like: Tensor) -> Tensor:
        count = len(self._states)
        cut = min(int(self._share * count + 1e-9), (count - 1) // 2)
        values = torch.stack([_summand(s[name]) for s in self._states])
        parts = torch.view_as_real(values) if values.is_complex() else values
        middle = parts.sort(0).values[cut : count - cut].mean(0)
        return torch.view_as_complex(middle) if values.is_complex() else middle


class ByColumn(Aggregate):
    """Every part of the states aggregated over those that have it.

    Args:
        like: names, shapes and dtypes of whole states.
        regions: disjoint parts of all tensors, by whoever has them.
        base: aggregates one part.
    """

    def __init__(
        self,
        like: State,
        regions: Mapping[Any, Sequence[tuple[str, Where]]],
        base: Callable[[State], Aggregate],
    ) -> None:
        self._like = like
        self._parts = [(where, base(_pieces(like, where))) for where in regions.values()]

    def add(self, state: State, weight: float) -> None:
        """Add a state, whose shapes tell which parts it has."""
        for where, aggregate in self._parts:
            name, at = where[0]
            if all(
                s.stop is None or s.stop <= n for s, n in zip(at, state[name].shape, strict=False)
            ):
                aggregate.add(_pieces(state, where), weight)

    def result(self) -> State:
        """See :class:`Aggregate`; zero where nobody had anything."""
        found = {n: torch.zeros_like(t) for n, t in self._like.items()}
        for where, aggregate in self._parts:
            for (name, at), piece in zip(where, aggregate.result().values(), strict=True):
                found[name][at] = piece
        return found


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


def _pieces(state: State, where: Sequence[tuple[str, Where]]) -> State:
    return {f"{i}": state[name][at] if at else state[name] for i, (name, at) in enumerate(where)}


def _summand(tensor: Tensor) -> Tensor:
    """A tensor in the dtype that sums of its kind are formed in."""
    if tensor.itemsize == 1 and tensor.is_floating_point():  # which torch does not promote
        return tensor.float()
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide(tensor)


def _like(mean: Tensor, like: Tensor) -> Tensor:
    """A mean in the dtype that it is of, and on its device."""
    exact = like.is_floating_point() or like.is_complex()
    return (mean if exact else mean.round()).to(like.dtype).to(like.device)
