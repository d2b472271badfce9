"""Other libraries' starts beside a frozen weight, for comparison and for those who know them.

All of them are the identity: a factor of the second half is zero. What they differ in is how far
the first steps go. The default, in ``variances.py``, goes as far as LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import RankError
from ..halves import Half
from .variances import fill_normal

Start = Literal["loha", "lycoris", "abba"]
STARTS: tuple[str, ...] = get_args(Start)


def fill_start(start: Start, halves: Sequence[Half], base: Callable[[], Tensor]) -> None:
    """Fill the factors of ``W₁ ⊙ W₂`` in place, from torch's global generator.

        loha      PEFT's LoHa: Kaiming-uniform factors as it lays them out, ``Var X = 1 / 3r`` and
                  ``Var Y = 1 / 3N``; with cores of K positions ``Var X = 1 / 3M``,
                  ``Var T = 1 / 3rK``; Y₂ is zero
        lycoris   LyCORIS: X₁ and the cores of std 0.1, the others of std 1; X₂ is zero
        abba      X₁ Y₁ᵀ is the best rank-r approximation of W₀, X₁ = U √S, Y₁ = V √S; X₂ is zero
                  and Y₂ drawn so that the first step is that of a LoRA of rank 2r (arXiv:2505.14238
                  has a scale in its place)

    Args:
        start: which.
        halves: two.
        base: gives W₀ as ``(M, N)``; asked by ``"abba"`` alone.

    Raises:
        RankError: ``"abba"`` for halves with cores, or a rank above W₀'s.
    """
    first, second = halves
    _FILL[start](first, second, base)
    nn.init.zeros_(second.y if start == "loha" else second.x)


def _loha(first: Half, second: Half, base: Callable[[], Tensor]) -> None:
    for half in (first, second):
        m, n, r = len(half.x), *half.y.shape
        fill_uniform(half.x, 1 / (3 * (r if half.t is None else m)))
        fill_uniform(half.y, 1 / (3 * n))
        if half.t is not None:
            fill_uniform(half.t, 1 / (3 * half.t[0].numel()))


def _lycoris(first: Half, second: Half, base: Callable[[], Tensor]) -> None:
    for half, of_x in ((first, 0.1), (second, 1.0)):
        fill_normal(half.x, of_x)
        fill_normal(half.y, 1.0)
        if half.t is not None:
            fill_normal(half.t, 0.1)


def _abba(first: Half, second: Half, base: Callable[[], Tensor]) -> None:
    if first.t is not None:
        raise RankError(
            "init_weights='abba' starts from the singular vectors of a matrix, which a kernel with "
            "cores has not: set use_effective_conv2d=False, or take another start"
        )
    if first.x.is_meta:
        return
    weight = base()
    if weight.is_meta:
        raise RankError(
            "init_weights='abba' starts from the base weight's singular vectors, and the weight is "
            "on the meta device: load it first, or make the adapter there too (low_cpu_mem_usage)"
        )
    r = first.x.shape[1]
    if r > min(weight.shape):
        raise RankError(
            f"init_weights='abba': rank {r} is more than the {min(weight.shape)} singular values "
            f"of a weight of shape {tuple(weight.shape)}: lower r"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    u, s, vt = torch.linalg.svd(weight.detach().to(wide), full_matrices=False)
    root = s[:r].sqrt()
    with torch.no_grad():
        first.x.copy_(u[:, :r] * root)
        first.y.copy_(vt[:r].T * root)
    # One step moves ΔW by η G r Var(Y₂) times the squares of W₁'s entries, whose mean is Σ s² / MN.
    mean_square = float(s[:r].square().sum()) / weight.numel()
    variance = 2 / (3 * weight.shape[1] * mean_square) if mean_square else 0.0
    fill_normal(second.y, math.sqrt(variance))


def fill_uniform(tensor: Tensor, variance: float) -> None:
    """Fill a factor in place with a uniform law of this variance around zero."""
    bound = math.sqrt(3 * variance)
    with torch.no_grad():
        tensor.uniform_(-bound, bound)


_FILL = {"loha": _loha, "lycoris": _lycoris, "abba": _abba}
