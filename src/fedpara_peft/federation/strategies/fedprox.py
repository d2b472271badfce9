"""FedProx (Li et al., arXiv:1812.06127)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..state import Broadcast
from .base import Correction, Kept, Strategy


@dataclass(frozen=True)
class FedProx(Strategy):
    """Keep clients near the broadcast with a proximal term.

        min_w F_i(w) + (μ/2) ‖w - w_t‖²

    Attributes:
        mu: μ; 0 is FedAvg.
    """

    mu: float = 0.01
    ranks_may_differ: ClassVar[bool] = True
    updates_may_be_late: ClassVar[bool] = True

    def correction(self, broadcast: Broadcast, kept: Kept) -> Correction | None:
        """Add the proximal term's gradient, μ (w - w_t)."""
        return Correction(pull=self.mu) if self.mu else None
