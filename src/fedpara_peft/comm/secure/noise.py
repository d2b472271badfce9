"""Noise on a grid of integers, of which a sum modulo 2^k loses nothing.

    P[k] ∝ exp(-k² / 2σ²),   k ∈ ℤ

the discrete Gaussian, drawn as Canonne, Kamath and Steinke do (NeurIPS 2020, arXiv:2004.00010): of
a discrete Laplace by rejection, in floating-point numbers of 53 bits where they have rationals.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .primitives import stream

#: Draws at once: what is held of them is bounded.
_AT_ONCE = 1 << 17


def discrete_gaussian(count: int, std: float, key: bytes) -> NDArray[np.int64]:
    """So many independent draws.

    Args:
        count: draws.
        std: σ, at least 1.
        key: 32 secret bytes that are used for nothing else.
    """
    found, turn = [np.empty(0, np.int64)], 0
    left = count
    while left > 0:
        kept = _kept(min(2 * left + 64, _AT_ONCE), std, key, turn)[:left]
        found.append(kept)
        left, turn = left - len(kept), turn + 1
    return np.concatenate(found)


def _kept(tries: int, std: float, key: bytes, turn: int) -> NDArray[np.int64]:
    scale = math.floor(std) + 1.0
    words = np.frombuffer(stream(key, 24 * tries, turn.to_bytes(12, "little")), "<u8")
    one, other, coin = (((words >> np.uint64(11)) + np.uint64(1)) * 2.0**-53).reshape(3, tries)
    laplace = np.floor(-np.log(one) * scale) - np.floor(-np.log(other) * scale)
    chance = np.exp(-((np.abs(laplace) - std**2 / scale) ** 2) / (2 * std**2))
    return laplace[coin <= chance].astype(np.int64)
