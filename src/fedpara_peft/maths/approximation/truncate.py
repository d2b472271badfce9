"""The best approximation of a low rank, from the factors alone.

A weight that has a low-rank form is never composed. With ``A = Q_A R_A`` and ``B = Q_B R_B``

    A Bᵀ = Q_A S Q_Bᵀ,   S = R_A R_Bᵀ            (R, R) at most, however large the weight

has the singular values of S, and the best rank k is that of S between the two Q (Eckart and Young).
A kernel is taken as the matrix ``(M, N · K)``, as LoRA's convolutions take it; its core joins S:

    S[a, (b, κ)] = Σ R_A[a, c] core[c, d, κ] R_B[b, d]

All is computed in float64, where the eigenvalues of ``S Sᵀ`` give the singular values to 1e-8 of
the largest. The Q are never formed either: their reflectors are applied to k columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RankError
from ..halves import LowRankForm
from ..precision import as_given

#: Of the largest eigenvalue of S Sᵀ: what lies below is rounding.
_ROUNDING = 2.0**-52


class LowRankPair(NamedTuple):
    """A weight as ``up · down``, LoRA's two factors.

    Attributes:
        up: ``(M, k)``.
        down: ``(k, N, *kernel)``; ``(k, N)`` for a matrix.
    """

    up: Tensor
    down: Tensor


class Truncation(NamedTuple):
    """A best low-rank approximation.

    Attributes:
        pair: the approximation, float64; the root of each singular value is in either factor.
        singular_values: all of the weight's, falling, float64.
        error: ``‖W - up · down‖ / ‖W‖`` (Frobenius); 0 for a weight that is zero.
    """

    pair: LowRankPair
    singular_values: Tensor
    error: float


def exact_pair(form: LowRankForm, scale: float = 1.0) -> LowRankPair:
    """The form itself as a pair: ``up = scale · A``, ``down = Bᵀ`` or core and Bᵀ in one.

    Args:
        form: the weight.
        scale: factor on it.

    Returns:
        A pair of rank R, dtype of the form; exact.
    """
    a, b, core = form
    down = b.T if core is None else torch.einsum("ab...,ib->ai...", core, b)
    return LowRankPair(scale * a, down)


def truncate(
    form: LowRankForm,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    scale: float = 1.0,
) -> Truncation:
    """The best approximation of a weight at a rank, or of the least rank within an error.

    Args:
        form: the weight, ``A Bᵀ`` or ``core ×₁ A ×₂ B``.
        rank: k; a weight of lower rank keeps its own.
        tolerance: the relative Frobenius error that is allowed, in [0, 1).
        scale: factor on the weight.

    Returns:
        The approximation, float64 on the form's device; its rank is at least 1.

    Raises:
        RankError: not exactly one of rank and tolerance is given, or it is out of range, or the
            weight is not finite.
    """
    check_truncation(rank, tolerance)
    if (rank is None) == (tolerance is None):
        raise RankError("give either a rank or a tolerance")
    a, b = form.a.double(), form.b.double()
    with torch.no_grad(), as_given(a.device):
        q_a, r_a = _reflectors(a)
        q_b, r_b = _reflectors(b)
        small = _small(r_a * scale, r_b, form.core)  # (p, q, K)
        flat = small.flatten(1)
        gram = flat @ flat.T
        if not bool(torch.isfinite(gram).all()):
            raise RankError("the weight has values that are not finite")
        squares, vectors = torch.linalg.eigh(gram)
        squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
        kept = _kept(squares, rank, tolerance)
        roots = squares[:kept].sqrt().sqrt()  # of the singular values
        real = squares[:kept] > squares[0] * _ROUNDING
        inverse = torch.where(real, 1 / roots, torch.zeros_like(roots))
        top = vectors[:, :kept]
        up = _times_q(q_a, top * torch.where(real, roots, torch.zeros_like(roots)))
        down = (top.T @ flat).view(kept, *small.shape[1:]) * inverse.view(-1, 1, 1)
        # Q_B runs over the middle: N, for each row and each kernel position.
        down = _times_q(q_b, down.permute(1, 0, 2).flatten(1)).view(-1, kept, small.shape[2])
        down = down.permute(1, 0, 2)
        kernel = () if form.core is None else form.core.shape[2:]
        down = down.reshape(kept, b.shape[0], *kernel)
    total, tail = float(squares.sum()), float(squares[kept:].sum())
    error = math.sqrt(tail / total) if total > 0 else 0.0
    return Truncation(LowRankPair(up, down), squares.sqrt(), error)


def singular_values(form: LowRankForm) -> Tensor:
    """All singular values of a weight, falling, float64; a kernel's are those of ``(M, N · K)``."""
    return truncate(form, rank=1).singular_values


def frobenius_norm(form: LowRankForm, scale: float = 1.0) -> float:
    """``‖W‖`` (Frobenius) of a weight that is not composed, in float64."""
    with torch.no_grad(), as_given(form.a.device):
        up, down = (factor.double().flatten(1) for factor in exact_pair(form, scale))
        return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def relative_error(form: LowRankForm, pair: LowRankPair, scale: float = 1.0) -> float:
    """``‖W - up · down‖ / ‖W‖`` of any pair, of rounded factors too; W is not composed.

    By inner products in float64, so errors below 1e-8 do not show.

    Args:
        form: the weight.
        pair: what stands for it.
        scale: factor on the weight.

    Returns:
        The relative Frobenius error; 0 where both are zero, infinity where W alone is.
    """
    with torch.no_grad(), as_given(form.a.device):
        a, down = (factor.double() for factor in exact_pair(form, scale))
        up, other = pair.up.double().flatten(1), pair.down.double()
        down, other = down.flatten(1), other.flatten(1)
        whole = float(((a.T @ a) * (down @ down.T)).sum())
        both = float(((a.T @ up) * (down @ other.T)).sum())
        own = float(((up.T @ up) * (other @ other.T)).sum())
    difference = max(0.0, whole - 2 * both + own)
    if whole <= 0:
        return math.inf if difference > 0 else 0.0
    return math.sqrt(difference / whole)


def check_truncation(rank: int | None, tolerance: float | None) -> None:
    """Raise :class:`RankError` unless these can be asked of :func:`truncate`; both may be None."""
    if rank is not None and tolerance is not None:
        raise RankError(f"give a rank or a tolerance, not both: got {rank} and {tolerance}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RankError(f"rank must be an integer from 1, got {rank!r}")
    if tolerance is not None and not (
        isinstance(tolerance, int | float)
        and not isinstance(tolerance, bool)
        and 0 <= tolerance < 1
    ):
        raise RankError(f"tolerance must be in [0, 1), got {tolerance!r}")


def _reflectors(factor: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The Q of a factor as Householder reflectors, and its R."""
    packed, tau = torch.geqrf(factor)
    size = tau.shape[0]
    return (packed[:, :size], tau), packed[:size].triu()


def _times_q(q: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    """``Q C`` for the few columns of C."""
    reflectors, tau = q
    padded = columns.new_zeros(reflectors.shape[0], columns.shape[1])
    padded[: columns.shape[0]] = columns
    product: Tensor = torch.ormqr(reflectors, tau, padded)
    return product


def _small(r_a: Tensor, r_b: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return (r_a @ r_b.T).unsqueeze(2)
    core = core.double().flatten(2)  # (R, R, K)
    left = (r_a @ core.flatten(1)).view(r_a.shape[0], *core.shape[1:])
    return torch.einsum("abk,db->adk", left, r_b)


def _kept(squares: Tensor, rank: int | None, tolerance: float | None) -> int:
    if rank is not None:
        return min(rank, squares.shape[0])
    assert tolerance is not None
    tails = squares.flip(0).cumsum(0).flip(0)  # of the squares from here on
    allowed = tolerance**2 * tails[0]
    return max(1, int((tails > allowed).sum()))
