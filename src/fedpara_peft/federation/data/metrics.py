"""Metrics for ``compute_metrics``, and which way is better."""

from __future__ import annotations

import math
import re

import numpy as np
from transformers import EvalPrediction

from ..errors import ArgumentsError
from .loss import IGNORED

_LOWER = re.compile(
    r"(^|[_\W])(loss|perplexity|error|std|[rm]?m[sa]e|[wc]er)($|[_\W])", re.IGNORECASE
)


def higher_is_better(name: str) -> bool:
    """Whether more of a metric is better, by its name.

    False where one of the name's words is loss, perplexity, error, mse, rmse, mae, wer, cer, or std
    (the spread over clients): ``eval_loss``, ``word_error_rate``. True for every other.
    """
    return _LOWER.search(name) is None


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of labels that the highest logit (last dimension) is at; those of -100 do not count.

    Raises:
        ArgumentsError: there is not one label for each prediction.
    """
    predicted = np.argmax(prediction.predictions, axis=-1)
    labels = np.asarray(prediction.label_ids)
    if labels.shape != predicted.shape:
        if labels.shape != (*predicted.shape, 1):
            raise ArgumentsError(
                f"accuracy needs logits (…, classes) and labels (…), got "
                f"{np.shape(prediction.predictions)} and {labels.shape}: give compute_metrics"
            )
        labels = labels[..., 0]
    counts = labels != IGNORED
    return {"accuracy": float((predicted == labels)[counts].mean()) if counts.any() else math.nan}
