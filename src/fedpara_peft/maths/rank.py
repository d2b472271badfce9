"""Ranks and parameter counts of factorized weights, in exact integer arithmetic.

Shapes throughout: ``M`` output features, ``N`` input features, ``K`` kernel positions (the product
of the kernel size; 1 for a matrix). A kernel of one position is a matrix: Prop. 3 would only add an
``r x r`` core to it.

Equations and propositions: Hyeon-Woo, Ye-Bin, Oh, arXiv:2108.06098.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from .errors import RankError
from .parameterizations import FEDPARA, LOWRANK, get_parameterization

KernelSize = int | Sequence[int] | None


class RankBounds(NamedTuple):
    """Least and largest useful inner rank of a layer; see :func:`rank_bounds`."""

    minimum: int
    maximum: int


def parameter_count(
    r: int,
    out_features: int,
    in_features: int,
    kernel_size: KernelSize = None,
    parameterization: str = "fedpara",
) -> int:
    """Count the parameters of a factorized weight.

        2 r (M + N)             matrix, Prop. 1
        2 r (M + N) + 2 r² K    convolution, Prop. 3

    Each half has half of either: ``lowrank`` (``X Yᵀ``, or Tucker-2 for kernels) is one alone.

    Raises:
        RankError: ``r`` or a size is below 1.

    Example:
        >>> parameter_count(16, 256, 256), parameter_count(16, 256, 256, 3)
        (16384, 20992)
    """
    m, n, k = _sizes(out_features, in_features, kernel_size)
    check_rank(r)
    half = r * (m + n) + (r * r * k if k > 1 else 0)
    return get_parameterization(parameterization).num_halves * half


def rank_bounds(out_features: int, in_features: int, kernel_size: KernelSize = None) -> RankBounds:
    """Bounds of the inner rank of a FedPara layer.

    ``minimum = min(⌈√M⌉, ⌈√N⌉)`` is the least r with ``r² >= min(M, N)``, so that the weight is not
    rank-restricted (Corollary 1). ``maximum`` is the largest r whose parameter count does not
    exceed the dense layer's. Where ``maximum < minimum`` factorizing saves nothing.

    Raises:
        RankError: a size is below 1.

    Example:
        >>> rank_bounds(256, 256, 3)
        RankBounds(minimum=16, maximum=154)
    """
    m, n, k = _sizes(out_features, in_features, kernel_size)
    minimum = min(_ceil_sqrt(m), _ceil_sqrt(n))
    if k == 1:
        return RankBounds(minimum, m * n // (2 * (m + n)))
    # The floor of the positive root of 2K r² + 2(M+N) r - MNK = 0.
    s = m + n
    return RankBounds(minimum, (math.isqrt(s * s + 2 * k * m * n * k) - s) // (2 * k))


def rank_for_gamma(
    gamma: float, out_features: int, in_features: int, kernel_size: KernelSize = None
) -> int:
    """Inner rank for the rank ratio γ.

        r = ⌈(1 - γ) r_min + γ r_max⌉

    γ is read as the decimal it prints as and the sum is exact, because a floating-point ceiling is
    off by one in places (γ = 0.1 between 1 and 41 is 5, not 6).

    Raises:
        RankError: γ is outside [0, 1], a size is below 1, or the layer is so small that
            ``r_max < r_min`` (leave it dense).

    Example:
        >>> rank_for_gamma(0.1, 256, 256, 3)
        30
    """
    check_gamma(gamma)
    low, high = rank_bounds(out_features, in_features, kernel_size)
    if high < low:
        raise RankError(
            f"a {out_features}x{in_features} weight with kernel {kernel_size} has r_max={high} < "
            f"r_min={low}: factorizing it saves nothing; leave this layer dense"
        )
    ratio = Fraction(repr(float(gamma)))
    return math.ceil((1 - ratio) * low + ratio * high)


def rank_for_ratio(
    ratio: float, out_features: int, in_features: int, kernel_size: KernelSize = None
) -> int:
    """Least inner rank whose parameter count reaches a share of the dense layer's.

    The rule of the paper's published notebook: the smallest ``r >= ⌈√max(M, N)⌉`` with
    ``parameter_count(r) >= ratio · M N K``.

    Raises:
        RankError: ``ratio`` is not in (0, 1], or a size is below 1.

    Example:
        >>> r = rank_for_ratio(0.1, 256, 256, 3)
        >>> r, parameter_count(r, 256, 256, 3)
        (36, 60192)
    """
    if not 0 < ratio <= 1:
        raise RankError(f"ratio must be in (0, 1], got {ratio}: give the share of the dense layer")
    m, n, k = _sizes(out_features, in_features, kernel_size)
    target = Fraction(repr(float(ratio))) * m * n * k
    return _least_rank_reaching(math.ceil(target), _ceil_sqrt(max(m, n)), m, n, k, FEDPARA.name)


def low_rank_matching(
    r: int, out_features: int, in_features: int, kernel_size: KernelSize = None
) -> int:
    """Least rank of the low-rank baseline with at least FedPara's parameters at inner rank r.

    Matrices: ``2r``. Kernels: the least R with ``R² K + R (M + N) >= parameter_count(r)``.

    Raises:
        RankError: ``r`` or a size is below 1.
    """
    return matching_rank(r, out_features, in_features, kernel_size, LOWRANK.name)


def matching_rank(
    r: int,
    out_features: int,
    in_features: int,
    kernel_size: KernelSize = None,
    parameterization: str = FEDPARA.name,
) -> int:
    """Least rank at which a parameterization has at least FedPara's parameters at inner rank r.

    r itself wherever there are two halves.

    Raises:
        RankError: ``r`` or a size is below 1.
    """
    m, n, k = _sizes(out_features, in_features, kernel_size)
    return _least_rank_reaching(parameter_count(r, m, n, (k,)), 1, m, n, k, parameterization)


def check_rank(r: int) -> None:
    """Raise :class:`RankError` unless ``r`` is a positive integer."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        # PEFT's users know this sentence from its other tuners.
        raise RankError(f"`r` should be a positive integer value but the value passed is {r}")


def check_gamma(gamma: float) -> None:
    """Raise :class:`RankError` unless ``0 <= gamma <= 1``."""
    if not 0 <= gamma <= 1:
        raise RankError(
            f"gamma must be in [0, 1], got {gamma}: 0 gives the least rank without rank "
            "restriction, 1 the dense layer's parameter count"
        )


def kernel_positions(kernel_size: KernelSize) -> int:
    """Number of kernel positions ``K``; an int means a square 2-D kernel, None a matrix."""
    if kernel_size is None:
        return 1
    if isinstance(kernel_size, int):
        return kernel_size * kernel_size
    return math.prod(kernel_size)


def _sizes(m: int, n: int, kernel_size: KernelSize) -> tuple[int, int, int]:
    k = kernel_positions(kernel_size)
    if min(m, n, k) < 1:
        raise RankError(f"sizes must be at least 1, got {m}x{n} with kernel {kernel_size}")
    return m, n, k


def _ceil_sqrt(n: int) -> int:
    return math.isqrt(n - 1) + 1


def _least_rank_reaching(
    target: int, start: int, m: int, n: int, k: int, parameterization: str
) -> int:
    low, high = start, start
    kernel = (k,)
    while parameter_count(high, m, n, kernel, parameterization) < target:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        if parameter_count(middle, m, n, kernel, parameterization) < target:
            low = middle + 1
        else:
            high = middle
    return low
