"""Updates as integers of a range agreed on beforehand, for a sum cannot share clients' own maxima.

    q = ⌊s x / c + u⌋,   s = 2^(bits - 1) - 1,   u ~ U[0, 1),   x clamped to [-c, c]

Unbiased within the range: E[c q / s] = x and |c q / s - x| < c / s. One c serves all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...maths.precision import wide
from ..schema import Schema
from ..state import State


@dataclass(frozen=True)
class FixedRange:
    """Rounds states to integers, and back.

    Attributes:
        clip: c.
        bits: of an integer: 8, 16 or 32.
    """

    clip: float
    bits: int

    @property
    def levels(self) -> int:
        """s, the largest integer."""
        return 2 ** (self.bits - 1) - 1

    def integers(
        self, state: State, names: Sequence[str], generator: torch.Generator
    ) -> tuple[NDArray[np.int64], int]:
        """All entries of a state in the order of the names, and how many were clamped.

        Args:
            state: finite and real, on any device.
            names: of its tensors.
            generator: of u, on the CPU.
        """
        parts, clamped = [np.empty(0, np.int64)], 0
        for name in names:
            exact = wide(state[name].detach()).reshape(-1).cpu()
            clamped += int((exact.abs() > self.clip).sum())
            u = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
            q = (exact.clamp(-self.clip, self.clip) / self.clip * self.levels + u).floor()
            parts.append(q.clamp(-self.levels, self.levels).to(torch.int64).numpy())
        return np.concatenate(parts), clamped

    def state(self, integers: NDArray[np.int64], schema: Schema, weight: int = 1) -> State:
        """The state that integers are of, or the mean that a weighted sum of them is of.

        Args:
            integers: in the order of the schema's names.
            schema: names, shapes and dtypes.
            weight: of the sum, all together.
        """
        unit, start, found = self.clip / self.levels, 0, {}
        for name, entry in schema.items():
            part = torch.from_numpy(integers[start : start + entry.numel].copy())
            values = part.double() / weight * unit
            found[name] = values.to(entry.dtype).reshape(entry.shape)
            start += entry.numel
        return found
