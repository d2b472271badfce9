"""FedProx (Li et al., arXiv:1812.06127)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...comm.state import State
from .base import Strategy


@dataclass(frozen=True)
class FedProx(Strategy):
    """Keep clients near the broadcast with a proximal term.

        min_w F_i(w) + (μ/2) ‖w - w_t‖²

    Attributes:
        mu: μ; 0 is FedAvg.
    """

    mu: float = 0.01

    def correct(
        self, grads: Mapping[str, Tensor], params: Mapping[str, Tensor], broadcast: State
    ) -> Mapping[str, Tensor]:
        """Add the proximal term's gradient, μ (w - w_t)."""
        if self.mu == 0:
            return grads
        return {n: g + self.mu * (params[n] - broadcast[n]) for n, g in grads.items()}
