"""How far the mean of factors is from the mean of weights, measured."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ....comm.state import State
from ....maths.compose import compose_shared
from ....maths.precision import wide
from ....tuner.layer import factorized_weights
from ...state import ServerState


class AveragingBias:
    """Error of averaging a cohort's factors instead of its weights, in one round.

        ‖Σ p_i W(θ_i) - W(Σ p_i θ_i)‖_F / ‖Σ p_i W(θ_i) - W(θ_t)‖_F     over all layers together

    W is what the global factors compose to: the whole weight, or pFedPara's W₁.

    Args:
        model: a model with FedPara adapters; its tensors are overwritten.
        shared: its communicated tensors, live.
        start: w_t.
    """

    def __init__(self, model: nn.Module, shared: State, start: State) -> None:
        self._model, self._shared, self._start = model, shared, start
        self._before = [w.clone() for w in self._composed(start)]
        self._sums = [torch.zeros_like(w) for w in self._before]
        self._weight = 0.0

    def add(self, update: State, weight: float) -> None:
        """Take in a client's update."""
        moved = {name: self._start[name] + delta for name, delta in update.items()}
        for total, w in zip(self._sums, self._composed({**self._start, **moved}), strict=True):
            total.add_(w, alpha=weight)
        self._weight += weight

    def result(self, mean: State, before: ServerState, after: ServerState) -> float | None:
        """The bias of the factors' mean update; None where the cohort changed no weight.

        Args:
            mean: the factors' mean update.
            before: the server before the round.
            after: it after the round; its remainders, if any, make up for the bias.
        """
        moved = {name: self._start[name] + delta for name, delta in mean.items()}
        error = change = 0.0
        found = self._composed({**self._start, **moved})
        weights = factorized_weights(self._model)
        for one, total, w, start in zip(weights, self._sums, found, self._before, strict=True):
            exact = total / (self._weight or 1.0)
            if (name := one.remainder_name) in after.remainders.names:
                made_up = wide(after.params[name]) - wide(before.params[name])
                w = w + one.layer._as_composed(made_up, one.plan)
            error += float((exact - w).square().sum())
            change += float((exact - start).square().sum())
        return (error / change) ** 0.5 if change else None

    def _composed(self, state: State) -> Iterator[Tensor]:
        """What the global factors of every layer compose to, in float64."""
        with torch.no_grad():
            for name, tensor in self._shared.items():
                tensor.copy_(state[name])
            for found in factorized_weights(self._model):
                halves = [half.wide() for half in found.halves]
                spec = found.spec
                weight = compose_shared(halves, spec.parameterization, spec.nonlinearity)
                if (row := found.layer.zero_row) is not None:
                    weight[row] = 0
                yield weight
