"""FedAdagrad, FedAdam, FedYogi: adaptive server optimizers (Reddi et al., arXiv:2003.00295)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...maths.precision import as_real, from_real
from ..state import CohortMean, ServerState
from .base import Strategy, advance, moment


@dataclass(frozen=True)
class _Adaptive(Strategy):
    """Algorithm 2 of the paper, without bias correction.

        m ← β₁ m + (1 - β₁) Δ,   v by method,   w_{t+1} = w_t + η m / (√v + τ),   v₀ = τ²

    Of a complex number both parts are entries of their own, as torch's optimizers have it.

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
        for name, like in moment(server, "first").items():
            delta = as_real(mean.update[name])
            m = self.beta1 * as_real(like) + (1 - self.beta1) * delta
            v = self._second(as_real(kept[name]), delta.square())
            moved = self.server_learning_rate * m / (v.sqrt() + self.tau)
            first[name], second[name], step[name] = (from_real(x, like) for x in (m, v, moved))
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
