"""The low-rank halves that a weight is built from, and products of their factors.

A half is ``X Yᵀ`` for matrices, ``T ×₁ X ×₂ Y`` for convolution kernels. Equations and
propositions: arXiv:2108.06098.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, matmul

from .errors import RankError
from .precision import wide

Nonlinearity = Literal["tanh"] | None


class Half(NamedTuple):
    """The factors of one low-rank half of a weight.

    Attributes:
        x: output factor X, ``(M, r)``.
        y: input factor Y, ``(N, r)``.
        t: core T of a convolution kernel, ``(r, r, *kernel)``; None for a matrix.
    """

    x: Tensor
    y: Tensor
    t: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Half:
        """The same factors in another dtype."""
        return Half(
            self.x.to(dtype), self.y.to(dtype), None if self.t is None else self.t.to(dtype)
        )

    def wide(self) -> Half:
        """The same factors in float64; see :func:`~.precision.wide`."""
        return Half(wide(self.x), wide(self.y), None if self.t is None else wide(self.t))

    def tensors(self) -> list[Tensor]:
        """The factors that exist, in the order x, y, t."""
        return [f for f in self if f is not None]


def compose_half(half: Half) -> Tensor:
    """Compose one half of a weight.

        W = X Yᵀ             matrix
        W = T ×₁ X ×₂ Y      kernel (Tucker-2): W[o,i,k] = Σ_ab T[a,b,k] X[o,a] Y[i,b]

    Args:
        half: factors X ``(M, r)``, Y ``(N, r)`` and optionally T ``(r, r, *kernel)``.

    Returns:
        ``(M, N)`` or ``(M, N, *kernel)``, contiguous, dtype and device of the factors.

    Raises:
        RankError: the factors disagree on the rank.
    """
    x, y, t = half
    _check(half)
    if t is None:
        return matmul(x, y.T)
    # Y goes in first and only that small result is permuted: X @ V then comes out contiguous in the
    # convolution's own layout, which costs it less than any strided product would.
    r, kernel = t.shape[0], t.shape[2:]
    v = t.reshape(r, r, -1).transpose(1, 2).reshape(-1, r)  # (r·K, r)
    v = matmul(v, y.T)
    v = v.view(r, -1, y.shape[0]).transpose(1, 2).reshape(r, -1)  # (r, N·K)
    return matmul(x, v).view(x.shape[0], y.shape[0], *kernel)


class LowRankForm(NamedTuple):
    """A weight as ``A Bᵀ`` or ``core ×₁ A ×₂ B``.

    Attributes:
        a: ``(M, R)``.
        b: ``(N, R)``.
        core: ``(R, R, *kernel)`` for kernels by Prop. 3, else None.
    """

    a: Tensor
    b: Tensor
    core: Tensor | None = None


def khatri_rao(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise Khatri–Rao product: ``(n, r)`` and ``(n, s)`` to ``(n, r s)``."""
    return (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1)


def kronecker(t1: Tensor, t2: Tensor) -> Tensor:
    """Kronecker product of two cores at each kernel position."""
    r1, r2 = t1.shape[0], t2.shape[0]
    product = t1[:, None, :, None] * t2[None, :, None, :]
    return product.reshape(r1 * r2, r1 * r2, *t1.shape[2:])


def block_diagonal(cores: Sequence[Tensor]) -> Tensor:
    """The cores along the diagonal of one, at each kernel position."""
    size = sum(core.shape[0] for core in cores)
    out = cores[0].new_zeros(size, size, *cores[0].shape[2:])
    start = 0
    for core in cores:
        end = start + core.shape[0]
        out[start:end, start:end] = core
        start = end
    return out


def _check(half: Half) -> None:
    x, y, t = half
    if x.shape[-1] != y.shape[-1] or (t is not None and t.shape[:2] != (x.shape[-1],) * 2):
        raise RankError(
            f"the factors disagree on the rank: X {tuple(x.shape)}, Y {tuple(y.shape)}, "
            f"T {None if t is None else tuple(t.shape)}; X and Y end in r, T begins with r, r"
        )
