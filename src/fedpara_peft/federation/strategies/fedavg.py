"""FedAvg (McMahan et al., arXiv:1602.05629)."""

from __future__ import annotations

from typing import ClassVar

from .base import Strategy


class FedAvg(Strategy):
    """Average the clients' weights by their example counts.

    w_{t+1} = Σ_i (n_i / n) w_i = w_t + Σ_i (n_i / n) (w_i - w_t)
    """

    ranks_may_differ: ClassVar[bool] = True
    updates_may_be_late: ClassVar[bool] = True
