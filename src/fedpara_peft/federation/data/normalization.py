"""Batch norms, whose statistics are of a client's own data."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

logger = logging.getLogger(__name__)

_BatchNorm = nn.modules.batchnorm._BatchNorm


def normalizes_batches(model: nn.Module) -> bool:
    """Whether a batch norm of the model is in training mode, so that one row is no batch."""
    return any(isinstance(m, _BatchNorm) and m.training for m in model.modules())


def tell_of_shared_statistics(model: nn.Module, shared: Collection[str]) -> None:
    """Say once that a batch norm's statistics are averaged.

    Args:
        model: the global model.
        shared: names of what is communicated.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and f"{name}.running_mean".lstrip(".") in shared:
            logger.warning(
                "%r is batch norm: its statistics are averaged over the clients, badly where "
                "their data differ; group norm has none, and local_modules keeps batch norms "
                "with each client (FedBN)",
                name,
            )
            return
