"""Batches of a client's data, without a DataLoader per client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset, default_collate
from transformers import default_data_collator

Collator = Callable[[list[Any]], Any]


def batches(
    dataset: Any,
    batch_size: int,
    collator: Collator | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Any]:
    """Go through a data set once, in a random order if a generator is given.

    Tensor data sets are indexed directly. Other rows are collated: by ``collator``, else by
    transformers' default collator (mappings) or torch's (anything else).
    """
    size = len(dataset)
    order = torch.randperm(size, generator=generator) if generator else torch.arange(size)
    tensors = _tensors(dataset) if collator is None else None
    for indices in torch.split(order, batch_size):
        if tensors is not None:
            yield tuple(t[indices] for t in tensors)
            continue
        rows = _rows(dataset, indices.tolist())
        yield (collator or _default_collator(rows))(rows)


def _tensors(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    if isinstance(dataset, Subset) and (tensors := _tensors(dataset.dataset)) is not None:
        # Once per client and data set: the rows a client owns.
        if not hasattr(dataset, "_own_tensors"):
            own = torch.as_tensor(dataset.indices)
            dataset._own_tensors = tuple(t[own] for t in tensors)  # type: ignore[attr-defined]
        return dataset._own_tensors  # type: ignore[attr-defined]
    return None


def _rows(dataset: Any, indices: list[int]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(indices))
    return [dataset[i] for i in indices]


def _default_collator(rows: list[Any]) -> Collator:
    return default_data_collator if isinstance(rows[0], Mapping) else default_collate
