"""Initialization that gives the *composed* weight a wanted variance.

He-initializing every factor alone leaves the composed weight's std 14 to 350 times too small (by
fan-in), so that a deep net has no gradient, or several times too large (by fan-out). Here the
factors' std follows from the variance the composed weight shall have.

For Gaussian factors of variance σ², an entry of a half has variance ``r σ⁴`` (matrix) or ``r² σ⁶``
(kernel), and independent halves multiply: ``Var(W₁ ⊙ W₂) = Var W₁ · Var W₂``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ..errors import RankError
from ..halves import Nonlinearity
from ..parameterizations import get_parameterization
from ..parameterizations.base import TANH_VARIANCE_CAP
from ..rank import check_rank

__all__ = [
    "TANH_VARIANCE_CAP",
    "factor_std",
    "fill_normal",
    "half_variances",
    "identity_start_stds",
]


def half_variances(
    variance: float, parameterization: str, nonlinearity: Nonlinearity = None
) -> tuple[float, ...]:
    """Variance of each (activated) half so that the composed weight has ``variance``.

        fedpara    Var W₁ = Var W₂ = √v
        pfedpara   Var W₁ = v / (1 + b), Var W₂ = b, because Var(W₁ ⊙ (W₂ + 1)) = Var W₁ (b + 1);
                   b = 1, so that the personal half learns as well; with tanh its bound
        lowrank    Var W₁ = v

    Raises:
        RankError: ``variance`` is not positive.
    """
    if not variance > 0:
        raise RankError(f"the target variance must be positive, got {variance}")
    if nonlinearity == "tanh":
        variance = min(variance, TANH_VARIANCE_CAP)
    return get_parameterization(parameterization).half_variances(variance, nonlinearity == "tanh")


def factor_std(
    variance: float, r: int, *, kernel: bool = False, nonlinearity: Nonlinearity = None
) -> float:
    """Std of the factors of one half so that the (activated) half has ``variance``.

        σ = (v / r)^(1/4)     matrix: X, Y
        σ = (v / r²)^(1/6)    kernel: X, Y, T

    With tanh, ``E[tanh²(W)] = v`` is solved for the variance of W before the activation; the
    expectation is over the exact law of an entry (a Gaussian whose scale is χ-distributed).

    Args:
        variance: target variance of the half's entries, after the activation.
        r: inner rank.
        kernel: whether the half has a core T (Tucker-2).
        nonlinearity: None or ``"tanh"``.

    Raises:
        RankError: r < 1, or the variance cannot be reached (tanh needs less than 1).
    """
    check_rank(r)
    if nonlinearity == "tanh":
        variance = _pre_tanh_variance(variance, r, kernel)
    return float((variance / r**2) ** (1 / 6) if kernel else (variance / r) ** 0.25)


def identity_start_stds(
    r: int, fan_in: int, parameterization: str, *, kernel: bool = False
) -> list[tuple[float, float, float]]:
    """Std of X, Y and T of each half beside a frozen weight, where ΔW starts as zero.

    Nothing is composed yet whose variance could be matched; what the factors set is how far ΔW
    goes in the first steps. It goes as far as that of a LoRA of the same size (rank 2r for fedpara,
    r for the others), whose A is Kaiming-uniform as PEFT draws it and whose B is zero, so that
    LoRA's learning rates carry over, SGD's and Adam's:

        fedpara    W₁ of entries with variance 2;  X₂ = 0,  Var Y₂ = 1 / 3N
        others     X₁ = 0,  Var Y₁ = 1 / 3N         (a LoRA)

    Factors of one variance could have that first step, too, but not the next ones: under Adam an
    entry moves by η whatever its size, and LoRA speeds up because its A is small.

    Args:
        r: inner rank.
        fan_in: N, inputs of an output (channels times kernel positions).
        parameterization: the form of the weight.
        kernel: whether the halves have cores, which are the small factors then.

    Raises:
        RankError: r < 1.
    """
    check_rank(r)
    return get_parameterization(parameterization).identity_start_stds(r, fan_in, kernel=kernel)


def fill_normal(tensor: Tensor, std: float) -> None:
    """Fill a factor in place with N(0, std²) from torch's global generator."""
    with torch.no_grad():
        tensor.normal_(0.0, std)


@functools.lru_cache(maxsize=4096)
def _pre_tanh_variance(variance: float, r: int, kernel: bool) -> float:
    if not 0 < variance < 1:
        raise RankError(f"tanh keeps |W| below 1: it cannot reach variance {variance}")
    # Entry = sqrt(v) · s · z with z normal and s² a product of χ²_r / r: one for a matrix (the row
    # of X), two for a kernel (the rows of X and Y).
    points, weights = np.polynomial.hermite_e.hermegauss(32)
    weights = weights / weights.sum()
    chi, chi_weights = _chi_square_over_r(r)
    if kernel:
        chi, chi_weights = np.outer(chi, chi).ravel(), np.outer(chi_weights, chi_weights).ravel()
    entries = np.sqrt(chi)[:, None] * points[None, :]
    mass = chi_weights[:, None] * weights[None, :]

    def second_moment(v: float) -> float:
        return float((np.tanh(np.sqrt(v) * entries) ** 2 * mass).sum())

    low, high = variance, 2 * variance
    while second_moment(high) < variance:
        low, high = high, 2 * high
        if high > 1e12:
            raise RankError(
                f"tanh of a rank-{r} half cannot reach variance {variance}: choose a larger rank"
            )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if second_moment(middle) < variance else (low, middle)
    return high


def _chi_square_over_r(r: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for the law of χ²_r / r (substituting u² keeps r = 1 integrable)."""
    u = np.linspace(0, np.sqrt(r) + 8, 65)[1:]
    log_density = (r - 1) * np.log(u) - u**2 / 2
    weights = np.exp(log_density - log_density.max())
    return u**2 / r, weights / weights.sum()
