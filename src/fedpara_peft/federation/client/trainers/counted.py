"""What a transformers trainer's steps were made of: losses, and of how many terms each is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Counted:
    """Listens to a trainer's steps.

    A step's loss is the sum of what its batches returned: shares of a mean over the step's tokens,
    or over its batches. The trainer's own ``training_loss`` is a mean over steps whatever their
    tokens, and leaves out what is not finite.

    Args:
        trainer: about to train.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._step = trainer.training_step
        self._losses: dict[int, list[Tensor]] = {}
        self._terms: dict[int, Tensor | float] = {}
        self._last = 0
        trainer.training_step = self._counted

    def end(self) -> None:
        """Listen no more."""
        del self._trainer.training_step

    def result(self) -> tuple[float, int, float]:
        """The mean loss over all terms, the optimizer's steps, and all terms together."""
        steps = [s for s, terms in self._terms.items() if float(terms)]
        terms = torch.tensor([float(self._terms[s]) for s in steps], dtype=torch.float64)
        losses = torch.tensor(
            [sum(float(loss) for loss in self._losses[s]) for s in steps], dtype=torch.float64
        )
        total = float(terms.sum())
        mean = float(torch.dot(losses, terms)) / total if total else float("nan")
        return mean, int(self._trainer.state.global_step), total

    def _counted(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Tensor:
        number = int(self._trainer.state.global_step)
        if number < self._last:  # its batches were too large for memory: it starts again
            self._losses, self._terms = {}, {}
        self._last = number
        counted = more[0] if more else named.get("num_items_in_batch")
        rows = _rows(inputs)  # before they are used up
        loss: Tensor = self._step(model, inputs, *more, **named)
        self._losses.setdefault(number, []).append(loss.detach())
        if counted is not None:  # of the whole step
            self._terms[number] = counted
        else:
            self._terms[number] = self._terms.get(number, 0.0) + rows
        return loss


def _rows(inputs: Any) -> float:
    """The rows of a batch."""
    if isinstance(inputs, Mapping):
        tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
        return float(len(tensors[0])) if tensors else 1.0
    return 1.0
