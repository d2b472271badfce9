"""Evaluating a model on one data set, and clients on their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from transformers import EvalPrediction

from .batches import Collator, batches
from .crew import Crew
from .errors import ArgumentsError
from .loss import batch_size, labels_of_batch

Metrics = Callable[[EvalPrediction], Mapping[str, float]]


@dataclass(frozen=True)
class Evaluator:
    """Computes the loss and metrics of a model.

    Attributes:
        accelerator: device and mixed precision.
        batch_size: examples per step.
        compute_loss: ``(model, batch) -> loss`` or ``(loss, logits)``.
        compute_metrics: from an ``EvalPrediction`` to named numbers.
        collator: makes a batch from rows.
    """

    accelerator: Accelerator
    batch_size: int
    compute_loss: Callable[[nn.Module, Any], Any]
    compute_metrics: Metrics | None = None
    collator: Collator | None = None

    def __call__(
        self, model: nn.Module, dataset: Any, crew: Crew | None = None
    ) -> dict[str, float]:
        """The mean loss as ``loss``, and what ``compute_metrics`` finds.

        Args:
            model: on its device; left in the mode it was in.
            dataset: the examples.
            crew: the processes that evaluate this together, each some of the batches; None: this
                one alone.

        Raises:
            ArgumentsError: there are no examples, or metrics need outputs that the loss function
                does not return.
        """
        if dataset is None or not len(dataset):
            raise ArgumentsError("there are no examples to evaluate on: give eval_dataset")
        if crew is None or crew.size == 1:
            found = self._predictions(model, dataset, 0, 1)
        else:  # in the order of the batches, whoever had them
            index, count = crew.index, crew.size
            parts = crew.together(lambda: self._predictions(model, dataset, index, count))
            found = sorted(itertools.chain(*parts), key=lambda part: part[0])
        _, losses, sizes, logits, labels = zip(*found, strict=True)
        metrics = {
            "loss": sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / sum(sizes)
        }
        if self.compute_metrics is not None:
            prediction = EvalPrediction(np.concatenate(logits), np.concatenate(labels))
            values = self.compute_metrics(prediction)
            metrics.update({name: float(value) for name, value in values.items()})
        return metrics

    def _predictions(
        self, model: nn.Module, dataset: Any, index: int, count: int
    ) -> list[tuple[int, float, int, Any, Any]]:
        """Position, mean loss, size, logits and labels of every ``count``-th batch."""
        was_training = model.training
        model.eval()
        found = []
        rows = enumerate(batches(dataset, self.batch_size, self.collator))
        with torch.no_grad():
            for position, batch in itertools.islice(rows, index, None, count):
                batch = send_to_device(batch, self.accelerator.device)
                with self.accelerator.autocast():
                    output = self.compute_loss(model, batch)
                loss, outputs = output if isinstance(output, tuple) else (output, None)
                logits, labels = self._for_metrics(outputs, batch)
                found.append((position, float(loss), batch_size(batch), logits, labels))
        model.train(was_training)
        return found

    def _for_metrics(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        if self.compute_metrics is None:
            return None, None
        labels = labels_of_batch(batch)
        if outputs is None or labels is None:
            raise ArgumentsError(
                "compute_metrics needs logits and labels: let compute_loss return (loss, logits) "
                "and name the labels 'labels'"
            )
        return outputs.float().cpu().numpy(), labels.cpu().numpy()


def over_clients(values: Sequence[float], higher_is_better: bool) -> dict[str, float]:
    """Mean, mean of the worst tenth (one client at least) and standard deviation over clients."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    worst = ordered if higher_is_better else ordered[::-1]
    return {
        "mean": float(ordered.mean()),
        "worst_decile": float(worst[: math.ceil(len(worst) / 10)].mean()),
        "std": float(ordered.std()),
    }
