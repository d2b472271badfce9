"""FedAdagrad, FedAdam, FedYogi: adaptive server optimizers (Reddi et al., arXiv:2003.00295)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..state import CohortMean, ServerState
from .base import Strategy, advance, moment


@dataclass(frozen=True)
class _Adaptive(Strategy):
    """Algorithm 2 of the paper, without bias correction.

        m ← β₁ m + (1 - β₁) Δ,   v by method,   w_{t+1} = w_t + η m / (√v + τ),   v₀ = τ²

    Attributes:
        server_learning_rate: η.
        beta1: β₁.
        beta2: β₂ (FedAdagrad has none).
        tau: τ, the degree of adaptivity.
    """

    server_learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    ranks_may_differ: ClassVar[bool] = True
    updates_may_be_late: ClassVar[bool] = True

    def server_step(self, server: ServerState, mean: CohortMean) -> ServerState:
        """Move by the normalized first moment."""
        first, second, step = {}, {}, {}
        kept = moment(server, "second", self.tau**2)
        for name, m in moment(server, "first").items():
            delta = mean.update[name]
            first[name] = self.beta1 * m + (1 - self.beta1) * delta
            second[name] = self._second(kept[name], delta.square())
            scale = second[name].sqrt() + self.tau
            step[name] = self.server_learning_rate * first[name] / scale
        optimizer = {"first": first, "second": second}
        return advance(server, step, optimizer)

    @abstractmethod
    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        """The next second moment from the last and Δ²."""


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """``v ← v + Δ²``; see the module."""

    beta1: float = 0.0

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """``v ← β₂ v + (1 - β₂) Δ²``; see the module."""

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """``v ← v - (1 - β₂) Δ² sign(v - Δ²)``; see the module."""

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * (v - square).sign()
