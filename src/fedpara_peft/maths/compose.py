"""Compose a weight from its factors.

A weight is built from *halves* (``halves.py``), in the way of its parameterization
(``parameterizations/``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import RankError
from .halves import Half, Nonlinearity, compose_half
from .parameterizations import get_parameterization
from .precision import as_given

__all__ = [
    "Half",
    "Nonlinearity",
    "add_composed_",
    "check_halves",
    "compose",
    "compose_half",
    "compose_shared",
    "reachable_rank",
]


def compose(
    halves: Sequence[Half],
    parameterization: str = "fedpara",
    nonlinearity: Nonlinearity = None,
    *,
    scale: float = 1.0,
    base: Tensor | None = None,
) -> Tensor:
    """Compose the weight of a layer.

        fedpara    W = W₁ ⊙ W₂                Prop. 1 (matrices), Prop. 3 (kernels)
        pfedpara   W = W₁ ⊙ (W₂ + 1)          Sec. 2.3
        lowrank    W = W₁                     the baseline
        tanh       Wᵢ becomes tanh(Wᵢ)        Sec. 2.2; fedpara and pfedpara only

    Shapes:
        M outputs, N inputs, r inner rank. ``rank(W) <= r²`` for fedpara, ``r² + r`` for pfedpara,
        r for lowrank; with tanh there is no such bound.

    Args:
        halves: as many as the parameterization has.
        parameterization: a registered name, such as one of the forms above.
        nonlinearity: None or ``"tanh"``.
        scale: factor on the composed weight.
        base: tensor of the weight's shape to add it to, ``base + scale · W``; not modified.

    Returns:
        ``(M, N)`` or ``(M, N, *kernel)``, dtype and device of the factors, under autocast too.
        float16 is composed in float32: a product of two small entries would vanish in it.

    Raises:
        RankError: there is no such parameterization, the number of halves does not fit, or factors
            disagree on their shapes.

    Example:
        >>> x, y = torch.randn(6, 2), torch.randn(5, 2)
        >>> compose([Half(x, y), Half(x, y)]).shape
        torch.Size([6, 5])
    """
    check_halves(halves, parameterization, nonlinearity)
    dtype = halves[0].x.dtype
    if dtype == torch.float16:
        halves = [half.to(torch.float32) for half in halves]
    with as_given(halves[0].x.device):
        return _compose(halves, parameterization, nonlinearity, scale, base).to(dtype)


def _compose(
    halves: Sequence[Half],
    parameterization: str,
    nonlinearity: Nonlinearity,
    scale: float,
    base: Tensor | None,
) -> Tensor:
    parts = _activated(halves, nonlinearity)
    if base is not None and base.dtype != parts[0].dtype:
        base = base.to(parts[0].dtype)
    return get_parameterization(parameterization).combine(parts, scale, base)


def compose_shared(
    halves: Sequence[Half], parameterization: str, nonlinearity: Nonlinearity = None
) -> Tensor:
    """What the global factors compose to: the whole weight, or pFedPara's W₁."""
    parts = _activated(halves, nonlinearity)
    return get_parameterization(parameterization).combine(parts, shared=True)


def _activated(halves: Sequence[Half], nonlinearity: Nonlinearity) -> list[Tensor]:
    parts = [compose_half(half) for half in halves]
    return [torch.tanh(part) for part in parts] if nonlinearity == "tanh" else parts


def add_composed_(
    target: Tensor,
    halves: Sequence[Half],
    parameterization: str = "fedpara",
    nonlinearity: Nonlinearity = None,
    *,
    scale: float = 1.0,
    zero_row: int | None = None,
    chunk_entries: int = 1 << 20,
) -> None:
    """Add ``scale · W`` to a tensor in place, a few rows at a time.

    No temporary of the weight's size is made. Sums are formed in float32 at least.

    Args:
        target: ``(M, N)`` or ``(M, N, *kernel)``, or any shape with M rows of as many entries.
        halves: the factors.
        parameterization: see :func:`compose`.
        nonlinearity: see :func:`compose`.
        scale: factor on the composed weight.
        zero_row: a row of W that counts as zero.
        chunk_entries: entries composed at a time.
    """
    dtype = torch.promote_types(halves[0].x.dtype, torch.float32)
    wide = [half.to(dtype) for half in halves]
    rows = max(1, chunk_entries // max(1, target[0].numel()))
    with torch.no_grad():
        for start in range(0, target.shape[0], rows):
            part = target[start : start + rows]
            chunk = [half._replace(x=half.x[start : start + rows]) for half in wide]
            delta = compose(chunk, parameterization, nonlinearity, scale=scale)
            delta = delta.reshape(part.shape).to(part.device)
            if zero_row is not None and start <= zero_row < start + rows:
                delta[zero_row - start] = 0
            part.copy_(part.to(delta.dtype) + delta)


def check_halves(halves: Sequence[Half], parameterization: str, nonlinearity: Nonlinearity) -> None:
    """Raise :class:`RankError` unless the halves can form this parameterization."""
    own = get_parameterization(parameterization)
    if len(halves) != own.num_halves:
        raise RankError(f"{parameterization} takes {own.num_halves} halves, got {len(halves)}")
    if nonlinearity is not None and not own.multiplies:
        raise RankError(
            f"{parameterization} has no nonlinearity: tanh(W₁) ⊙ tanh(W₂) needs two halves"
        )


def reachable_rank(
    ranks: Sequence[int], parameterization: str, nonlinearity: Nonlinearity
) -> int | None:
    """Largest rank the composed matrix can have by its inner ranks; None where unbounded (tanh).

    ``r₁ r₂`` (Prop. 1), ``r₁ r₂ + r₁`` for pfedpara, ``r`` for lowrank. For kernels it bounds both
    channel unfoldings (Prop. 3).
    """
    if nonlinearity is not None:
        return None
    return get_parameterization(parameterization).reachable_rank(ranks)
