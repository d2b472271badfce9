"""A client's gradients: forward and backward, in the run's precision, over a step's batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...tuner.decay import composed_weight_decay
from ...tuner.jacobian import composed_weights, jacobian_correction
from ..arguments import FederatedArguments
from ..data.loss import Loss, LossFunction, read_loss
from ..errors import ClientDataError
from ..precision import Precision

_FIRST_LOSS_SCALE = 2.0**16


class Gradients:
    """Fills the parameters' ``grad``.

    Args:
        model: in place.
        parameters: its trainable ones.
        compute_loss: from the model and a batch to what :func:`~..data.loss.read_loss` reads.
        precision: of the forward pass.
        args: the run's settings.

    Attributes:
        loss_scale: fp16's, found anew by every client, so that no client depends on another.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        compute_loss: LossFunction,
        precision: Precision,
        args: FederatedArguments,
    ) -> None:
        self._model = model
        self._parameters = list(parameters.values())
        self._compute_loss = compute_loss
        owner = getattr(compute_loss, "owner", None)  # a strategy that has a loss of its own
        self._named = f"{owner}.local_loss" if owner else "compute_loss"
        self._precision = precision
        self._strength = args.jacobian_correction
        self._decay = args.composed_weight_decay
        self.loss_scale = 1.0

    def begin(self, rate: float) -> None:
        """A client begins.

        Args:
            rate: learning rate of its factors, for the Jacobian correction.
        """
        self._rate = rate
        self.loss_scale = _FIRST_LOSS_SCALE if self._precision.scales_loss else 1.0

    def of(self, window: list[tuple[Any, int]]) -> list[tuple[Tensor, float]]:
        """Gradients of the mean loss over a step's terms; every batch's loss and terms.

        A batch without a term (no label counts) is left out: its mean loss is not a number.
        """
        while True:
            for parameter in self._parameters:
                parameter.grad = None
            found: list[tuple[Tensor, float]] = []
            for batch, rows in window:
                loss, total = self._loss(batch)
                terms = float(rows if loss.terms is None else loss.terms)
                if not terms:
                    continue
                found.append((loss.mean.detach(), terms))
                # In units of the first batch: how many terms will come is known at the end only.
                share = terms / found[0][1] * self.loss_scale
                torch.autograd.backward(total if share == 1 else total * share)
            if len(found) > 1:
                share = found[0][1] / sum(terms for _, terms in found)
                grads = [p.grad for p in self._parameters if p.grad is not None]
                torch._foreach_mul_(grads, share)
            if not (found and self._precision.scales_loss) or self._unscale():
                return found

    def _unscale(self) -> bool:
        """Undo fp16's loss scale; False if it was too large and the step must be made again."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_mul_(grads, 1 / self.loss_scale)
        if self.loss_scale == 1 or all(bool(torch.isfinite(g).all()) for g in grads):
            return True
        self.loss_scale /= 2
        return False

    def _loss(self, batch: Any) -> tuple[Loss, Tensor]:
        """A batch's loss, alone and with what regularizers add to it."""
        if self._strength == 0:
            loss = self._forward(batch)
            total = loss.mean
        else:
            with composed_weights(self._model) as composed:
                loss = self._forward(batch)
                added = jacobian_correction(loss.mean, composed, self._rate, self._strength)
                total = loss.mean + added
        if self._decay:
            total = total + composed_weight_decay(self._model, self._decay)
        return loss, total

    def _forward(self, batch: Any) -> Loss:
        with self._precision.autocast():
            return read_loss(self._compute_loss(self._model, batch), self._named)


@contextmanager
def one_row_said() -> Iterator[None]:
    """Batch norm's refusal to normalize one value, as an error of the data."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ClientDataError(
            "batch norm cannot train on a batch of one row: raise per_client_batch_size, leave "
            "clients of one row out, or use group norm"
        ) from error
