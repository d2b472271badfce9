"""Metrics for ``compute_metrics``."""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of examples whose highest logit (last dimension) is at the label."""
    correct = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(correct.mean())}
