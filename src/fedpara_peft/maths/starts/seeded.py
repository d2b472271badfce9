"""A weight that begins as a dense one and is known by its seed: W = (W_seed − P(θ₀)) + P(θ).

The base W_seed − P(θ₀) is drawn on every machine anew and never sent, so it must come out in the
same bits everywhere. Products of matrices do not (their sums have another order on another
processor), nor do logarithms and cosines, of which normal numbers are made. So: uniform numbers of
a generator whose stream is fixed, on the CPU, and sums in one order, elementwise in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..halves import Half
from ..parameterizations import Parameterization

#: Entries of a half that are summed together: as many as a processor's cache holds.
_AT_A_TIME = 1 << 15


def seeded_uniform(seed: int, name: str, shape: Sequence[int], variance: float) -> Tensor:
    """A float64 tensor of independent uniform numbers around zero.

    Args:
        seed: any integer.
        name: what is drawn; another name gives other numbers.
        shape: of the tensor.
        variance: of an entry.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # MT19937 under numpy's legacy interface: its stream is frozen for good.
    generator = np.random.RandomState(np.frombuffer(key, dtype="<u4").astype(np.uint32))
    drawn = generator.random_sample(math.prod(shape))
    return torch.from_numpy((2 * drawn - 1) * math.sqrt(3 * variance)).reshape(tuple(shape))


def seeded_halves(
    seed: int,
    name: str,
    sizes: Sequence[tuple[tuple[int, ...], ...]],
    std: float,
    at_zero: Sequence[int] = (),
) -> list[Half]:
    """θ₀: the factors that a seed stands for, in float64.

    Args:
        seed: any integer.
        name: of the weight.
        sizes: the shapes of X, Y and, for kernels, T of each half.
        std: of all factors.
        at_zero: halves whose X is zero.
    """
    halves = []
    for half, shapes in enumerate(sizes):
        x, y, *t = (
            seeded_uniform(seed, f"{name}/w{half + 1}_{factor}", shape, std * std)
            for factor, shape in zip("xyt", shapes, strict=False)
        )
        halves.append(Half(torch.zeros_like(x) if half in at_zero else x, y, *t))
    return halves


def seeded_base(
    seed: int, name: str, variance: float, halves: Sequence[Half], form: Parameterization
) -> Tensor:
    """W_seed − P(θ₀) in float64, ``(M, N)`` or ``(M, N, *kernel)``.

    Args:
        seed: any integer.
        name: of the weight.
        variance: of an entry of W_seed.
        halves: θ₀.
        form: P.
    """
    parts = [_compose_in_order(half) for half in halves]
    base = seeded_uniform(seed, f"{name}/base", parts[0].shape, variance)
    for term in form.terms:
        product = parts[term[0]]
        for i in term[1:]:
            product = product * parts[i]
        base = base - product
    return base


def base_digest(base: Tensor) -> str:
    """A short name of a base: 16 hexadecimal digits of its values as float32."""
    values = base.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


def _compose_in_order(half: Half) -> Tensor:
    """A half, summed over the rank term by term, some rows at a time (which changes no sum)."""
    x, y, t = half
    r, size = x.shape[1], (len(x), len(y), *(() if t is None else t.shape[2:]))
    out = torch.zeros(size, dtype=x.dtype)
    rows = max(1, _AT_A_TIME // max(1, out[0].numel()))
    for start in range(0, len(x), rows):
        part, total = x[start : start + rows], out[start : start + rows]
        term = torch.empty_like(total)
        if t is None:
            for a in range(r):
                total += torch.mul(part[:, a, None], y[None, :, a], out=term)
            continue
        ones = [1] * (t.dim() - 2)
        tx = torch.zeros(len(part), *t.shape[1:], dtype=x.dtype)
        for a in range(r):
            tx += part[:, a].reshape(-1, 1, *ones) * t[a]
        for b in range(r):
            total += torch.mul(tx[:, b, None], y[:, b].reshape(1, -1, *ones), out=term)
    return out
