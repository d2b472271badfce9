"""Compose a weight from its factors.

A weight is built from one or two *halves*; a half is ``X Yᵀ`` for matrices, ``T ×₁ X ×₂ Y`` for
convolution kernels. Equations and propositions: arXiv:2108.06098.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import RankError
from .matmul import matmul
from .precision import as_given
from .rank import ParameterizationName

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


def compose(
    halves: Sequence[Half],
    parameterization: ParameterizationName = "fedpara",
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
        halves: one half for ``lowrank``, two otherwise.
        parameterization: which of the forms above.
        nonlinearity: None or ``"tanh"``.
        scale: factor on the composed weight.
        base: tensor of the weight's shape to add it to, ``base + scale · W``; not modified.

    Returns:
        ``(M, N)`` or ``(M, N, *kernel)``, dtype and device of the factors, under autocast too.
        float16 is composed in float32: a product of two small entries would vanish in it.

    Raises:
        RankError: the number of halves does not fit, or factors disagree on their shapes.

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
    parameterization: ParameterizationName,
    nonlinearity: Nonlinearity,
    scale: float,
    base: Tensor | None,
) -> Tensor:
    parts = [compose_half(h) for h in halves]
    if base is not None and base.dtype != parts[0].dtype:
        base = base.to(parts[0].dtype)
    if nonlinearity == "tanh":
        parts = [torch.tanh(p) for p in parts]
    if parameterization == "pfedpara":
        base = parts[0] if base is None and scale == 1 else _plus(base, parts[0], scale)
    if parameterization == "lowrank":
        return _plus(base, parts[0], scale)
    if base is not None:
        return torch.addcmul(base, parts[0], parts[1], value=scale)
    return _plus(None, parts[0] * parts[1], scale)


def add_composed_(
    target: Tensor,
    halves: Sequence[Half],
    parameterization: ParameterizationName = "fedpara",
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


def check_halves(
    halves: Sequence[Half], parameterization: ParameterizationName, nonlinearity: Nonlinearity
) -> None:
    """Raise :class:`RankError` unless the halves can form this parameterization."""
    wanted = 1 if parameterization == "lowrank" else 2
    if len(halves) != wanted:
        raise RankError(f"{parameterization} takes {wanted} halves, got {len(halves)}")
    if parameterization == "lowrank" and nonlinearity is not None:
        raise RankError("lowrank has no nonlinearity: tanh(W₁) ⊙ tanh(W₂) needs two halves")


def reachable_rank(
    ranks: Sequence[int], parameterization: ParameterizationName, nonlinearity: Nonlinearity
) -> int | None:
    """Largest rank the composed matrix can have by its inner ranks; None where unbounded (tanh).

    ``r₁ r₂`` (Prop. 1), ``r₁ r₂ + r₁`` for pfedpara, ``r`` for lowrank. For kernels it bounds both
    channel unfoldings (Prop. 3).
    """
    if nonlinearity is not None:
        return None
    if parameterization == "lowrank":
        return ranks[0]
    product = ranks[0] * ranks[1]
    return product + ranks[0] if parameterization == "pfedpara" else product


def _plus(base: Tensor | None, part: Tensor, scale: float) -> Tensor:
    if base is None:
        return part if scale == 1 else part * scale
    return torch.add(base, part, alpha=scale)


def _check(half: Half) -> None:
    x, y, t = half
    if x.shape[-1] != y.shape[-1] or (t is not None and t.shape[:2] != (x.shape[-1],) * 2):
        raise RankError(
            f"the factors disagree on the rank: X {tuple(x.shape)}, Y {tuple(y.shape)}, "
            f"T {None if t is None else tuple(t.shape)}; X and Y end in r, T begins with r, r"
        )
