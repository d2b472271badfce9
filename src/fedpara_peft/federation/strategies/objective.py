"""What a client minimizes: the loss as its strategy has it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...comm.state import State
from ..data.loss import Loss, LossFunction, read_loss
from ..state import Broadcast
from .base import Kept, Strategy


class Objective:
    """A loss function of model and batch, of one client after the other.

    Args:
        strategy: the federated optimizer.
        compute_loss: the run's, which the strategy may add to.
    """

    def __init__(self, strategy: Strategy, compute_loss: LossFunction) -> None:
        self._strategy = strategy
        self._compute_loss = compute_loss
        self._broadcast = Broadcast({})
        self._kept: Kept = {}

    @property
    def owner(self) -> str | None:
        """The strategy's name, if the objective is its own; None: it is the run's loss."""
        return type(self._strategy).__name__ if has_own_loss(self._strategy) else None

    def begin(self, broadcast: Broadcast, kept: Kept) -> None:
        """A client's turn begins.

        A strategy of one's own gets copies: a forward pass at other weights, in training mode,
        moves the buffers that it is given, and these are everybody's.

        Args:
            broadcast: what it received, of the parameters that train.
            kept: what the strategy keeps for it.
        """
        if self.owner is not None:
            extra = {group: _copy(state) for group, state in broadcast.extra.items()}
            broadcast = Broadcast(_copy(broadcast.params), extra)
            kept = {group: _copy(state) for group, state in kept.items()}
        self._broadcast, self._kept = broadcast, kept

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """What :func:`~..data.loss.read_loss` reads."""
        return self._strategy.local_loss(model, batch, self._plain, self._broadcast, self._kept)

    def _plain(self, model: nn.Module, batch: Any) -> Loss:
        return read_loss(self._compute_loss(model, batch))


def has_own_loss(strategy: Strategy) -> bool:
    """Whether a strategy's clients minimize something else than the run's loss."""
    return type(strategy).local_loss is not Strategy.local_loss


def _copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}
