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
from torch import Tensor, nn
from transformers import EvalPrediction

from ..crew import Crew
from ..data.batches import Collator, batch_sizes, batches, count_rows
from ..data.labels import labels_of_batch
from ..data.loss import IGNORED, LossFunction, read_loss
from ..errors import ArgumentsError
from ..precision import Precision
from ..random import derived_seed, reseed, seeded

Metrics = Callable[[EvalPrediction], Mapping[str, Any] | float]


@dataclass(frozen=True)
class Evaluator:
    """Computes the loss and metrics of a model.

    Attributes:
        accelerator: the device.
        precision: mixed precision.
        batch_size: examples per step.
        compute_loss: from the model and a batch to what :func:`~..data.loss.read_loss` reads.
        compute_metrics: from an ``EvalPrediction`` to what :func:`named_metrics` reads.
        collator: makes a batch from rows.
        label_column: where a mapping has the labels that metrics see; None: found by name.
        seed: of what transforms and collators draw; every evaluation sees the same.
    """

    accelerator: Accelerator
    precision: Precision
    batch_size: int
    compute_loss: LossFunction
    compute_metrics: Metrics | None = None
    collator: Collator | None = None
    label_column: str | None = None
    seed: int = 0

    def __call__(
        self, model: nn.Module, dataset: Any, crew: Crew | None = None
    ) -> dict[str, float]:
        """The mean loss as ``loss``, and what ``compute_metrics`` finds.

        The mean is over all terms (rows, or tokens that count), however they are batched.

        Args:
            model: on its device; left in the mode it was in.
            dataset: the examples.
            crew: the processes that evaluate this together, each some of the batches; None: this
                one alone.

        Raises:
            ArgumentsError: there are no examples, or metrics need outputs that the loss function
                does not return.
            ClientDataError: the data cannot be evaluated on.
        """
        if dataset is None or not count_rows(dataset):
            raise ArgumentsError("there are no examples to evaluate on: give eval_dataset")
        if crew is None or crew.size == 1:
            found = self._predictions(model, dataset, 0, 1)
        else:  # in the order of the batches, whoever had them
            index, count = crew.index, crew.size
            parts = crew.together(lambda: self._predictions(model, dataset, index, count))
            found = sorted(itertools.chain(*parts), key=lambda part: part[0])
        _, losses, terms, logits, labels = zip(*found, strict=True)
        if not sum(terms):
            raise ArgumentsError("no label of the examples counts (all are -100): give labels")
        total = sum(loss * n for loss, n in zip(losses, terms, strict=True) if n)
        metrics = {"loss": total / sum(terms)}
        if self.compute_metrics is not None:
            prediction = EvalPrediction(_joined(logits), _joined(labels))
            metrics.update(named_metrics(self.compute_metrics(prediction)))
        return metrics

    def _predictions(
        self, model: nn.Module, dataset: Any, index: int, count: int
    ) -> list[tuple[int, float, float, Any, Any]]:
        """Position, mean loss, terms, logits and labels of every ``count``-th batch."""
        was_training, device = model.training, self.accelerator.device
        model.eval()
        found = []
        rows = batches(dataset, self.batch_size, self.collator, share=(index, count))
        positions = range(len(batch_sizes(count_rows(dataset), self.batch_size)))[index::count]
        seeds = [derived_seed(self.seed, "evaluation", position) for position in positions]
        with torch.no_grad(), seeded(self.seed, device):
            for position, seed in zip(positions, seeds, strict=True):
                reseed(seed, device)  # of this batch, whichever process has it
                batch, size = next(rows)
                batch = send_to_device(batch, device)
                with self.precision.autocast():
                    loss = read_loss(self.compute_loss(model, batch))
                terms = float(size if loss.terms is None else loss.terms)
                logits, labels = self._for_metrics(loss.outputs, batch)
                found.append((position, float(loss.mean), terms, logits, labels))
        model.train(was_training)
        return found

    def _for_metrics(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        if self.compute_metrics is None:
            return None, None
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        labels = labels_of_batch(batch, self.label_column)
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
            raise ArgumentsError(
                "compute_metrics needs logits and labels: let compute_loss return (loss, logits) "
                "and name the labels 'labels', or set label_column"
            )
        return logits.float().cpu().numpy(), labels.cpu().numpy()


def named_metrics(found: Any) -> dict[str, float]:
    """What ``compute_metrics`` returned, as numbers by name.

    A bare number is called ``metric``; entries of a mapping in a mapping get both names, joined by
    ``_``. A name may be left out where it is not defined.

    Raises:
        ArgumentsError: it is something else.
    """
    if not isinstance(found, Mapping):
        return {"metric": _number("metric", found)}
    named: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            named.update({f"{name}_{inner}": v for inner, v in named_metrics(value).items()})
        else:
            named[str(name)] = _number(name, value)
    return named


def _number(name: Any, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentsError(
            f"compute_metrics returned {value!r:.100} as {name!r}: return numbers by name"
        ) from None


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All batches' arrays as one; what is shorter is filled up with -100, as transformers does."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    if len({part.ndim for part in parts}) > 1:
        shapes = sorted({part.shape for part in parts})[:3]
        raise ArgumentsError(f"batches give metrics arrays of the shapes {shapes}: use one form")
    longest = np.max([part.shape[1:] for part in parts], axis=0)
    return np.concatenate(
        [
            np.pad(
                part,
                [(0, 0), *((0, n - m) for n, m in zip(longest, part.shape[1:], strict=True))],
                constant_values=IGNORED,
            )
            for part in parts
        ]
    )


def over_clients(values: Sequence[float], higher_is_better: bool) -> dict[str, float]:
    """Mean, mean of the worst tenth (one client at least) and standard deviation over clients.

    Not a number where any value is not one.
    """
    if np.isnan(values).any():
        return dict.fromkeys(("mean", "worst_decile", "std"), math.nan)
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    worst = ordered if higher_is_better else ordered[::-1]
    return {
        "mean": float(ordered.mean()),
        "worst_decile": float(worst[: math.ceil(len(worst) / 10)].mean()),
        "std": float(ordered.std()),
    }
