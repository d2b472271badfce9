"""Metrics for ``compute_metrics``, and which way is better."""

from __future__ import annotations

import re

import numpy as np
from transformers import EvalPrediction

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
    """Share of examples whose highest logit (last dimension) is at the label."""
    correct = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(correct.mean())}
