"""Loss and predictions of a batch, for plain torch modules and transformers models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ClientDataError

_LABELS = ("labels", "label")


def default_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Loss and outputs of a batch.

    A mapping goes to the model by keyword and the loss is taken from its output (transformers);
    where the output has none, it is the cross-entropy with the entry ``labels`` or ``label``. A
    pair ``(inputs, labels)`` is classified by cross-entropy.

    Returns:
        The mean loss (a scalar) and the model's logits.

    Raises:
        ClientDataError: the batch has no labels this could use.
    """
    if isinstance(batch, Mapping):
        labels = labels_of_batch(batch)
        inputs = {k: v for k, v in batch.items() if k not in _LABELS}
        if hasattr(getattr(model, "config", None), "model_type"):
            output = model(**batch)
            if getattr(output, "loss", None) is not None:
                return output.loss, output.logits
            logits = output.logits
        else:
            logits = model(*inputs.values()) if len(inputs) == 1 else model(**inputs)
        if labels is None:
            raise ClientDataError(
                f"a batch has no labels ({sorted(batch)}): name the column 'labels', or give "
                "compute_loss(model, batch)"
            )
        return F.cross_entropy(logits, labels), logits
    if isinstance(batch, tuple | list) and len(batch) == 2:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]), logits
    raise ClientDataError(
        f"a batch is a {type(batch).__name__}: give a mapping or a pair (inputs, labels), or "
        "compute_loss(model, batch)"
    )


def labels_of_batch(batch: Any) -> Tensor | None:
    """The labels of a batch, None where it has none."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in _LABELS if name in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None


def batch_size(batch: Any) -> int:
    """Number of examples in a batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next(len(value) for value in values if isinstance(value, Tensor))
