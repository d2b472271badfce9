"""Batches of a client's data, without a DataLoader per client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset, default_collate
from transformers import default_data_collator

#: Batches of tensors that are indexed at once; a batch is then a view.
_GATHERED_BATCHES = 64

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
    found = tensors_of(dataset) if collator is None else None
    if found is not None:
        tensors, own = found
        chosen = order if own is None else own[order]
        for several in torch.split(chosen, _GATHERED_BATCHES * batch_size):
            parts = [torch.split(t[several], batch_size) for t in tensors]
            yield from zip(*parts, strict=True)
        return
    for indices in torch.split(order, batch_size):
        rows = _rows(dataset, indices.tolist())
        yield (collator or _default_collator(rows))(rows)


def tensors_of(dataset: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None] | None:
    """The tensors of a data set and which of their rows are its own (None: all)."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors, None
    if isinstance(dataset, Subset) and (found := tensors_of(dataset.dataset)) is not None:
        own = torch.as_tensor(dataset.indices)
        return found[0], own if found[1] is None else found[1][own]
    return None


def _rows(dataset: Any, indices: list[int]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(indices))
    return [dataset[i] for i in indices]


def _default_collator(rows: list[Any]) -> Collator:
    return default_data_collator if isinstance(rows[0], Mapping) else default_collate
