"""Batches of a client's data, without a DataLoader per client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate
from transformers import default_data_collator

from ..errors import ClientDataError

#: Batches of tensors that are indexed at once; a batch is then a view.
_GATHERED_BATCHES = 64

Collator = Callable[[list[Any]], Any]
#: What becomes of a last batch that is not full: see :func:`batch_sizes`.
LastBatch = Literal["keep", "drop", "merge"]


def batches(
    dataset: Any,
    batch_size: int,
    collator: Collator | None = None,
    generator: torch.Generator | None = None,
    last: LastBatch = "keep",
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Any, int]]:
    """Go through a data set once, in a random order if a generator is given.

    Tensor data sets are indexed directly, unless they have a ``__getitem__`` of their own. Other
    rows are collated: by ``collator``, else by transformers' default collator (mappings) or
    torch's (anything else).

    Args:
        dataset: the rows.
        batch_size: rows of a batch.
        collator: makes a batch from rows.
        generator: of the order.
        last: what becomes of a last batch that is not full.
        share: ``(i, n)``: every n-th batch from the i-th on; the others' rows are not read.

    Yields:
        A batch, and of how many rows it is.
    """
    size = count_rows(dataset)
    order = torch.randperm(size, generator=generator) if generator else torch.arange(size)
    sizes = batch_sizes(size, batch_size, last)
    parts = torch.split(order[: sum(sizes)], sizes)[share[0] :: share[1]]
    found = tensors_of(dataset) if collator is None else None
    if found is None:
        for part in parts:
            rows = read_rows(dataset, part.tolist())
            yield (collator or _default_collator(rows))(rows), len(part)
        return
    tensors, own = found
    for start in range(0, len(parts), _GATHERED_BATCHES):
        several = parts[start : start + _GATHERED_BATCHES]
        sizes = [len(part) for part in several]
        chosen = torch.cat(several)
        chosen = chosen if own is None else own[chosen]
        columns = [torch.split(tensor[chosen], sizes) for tensor in tensors]
        yield from zip(zip(*columns, strict=True), sizes, strict=True)


def batch_sizes(rows: int, batch_size: int, last: LastBatch = "keep") -> list[int]:
    """The sizes of all batches of a data set.

    A last batch that is not full is kept; with ``"drop"`` it is left out, unless it is the only
    one; with ``"merge"`` a single row joins the batch before it, for batch norm cannot normalize
    one row (batches of one row by choice stay as they are).
    """
    whole, rest = divmod(rows, batch_size)
    sizes = [batch_size] * whole
    if rest == 0 or (last == "drop" and whole):
        return sizes
    if last == "merge" and rest == 1 and whole and batch_size > 1:
        return [*sizes[:-1], batch_size + 1]
    return [*sizes, rest]


def count_rows(dataset: Any) -> int:
    """The number of a data set's rows.

    Raises:
        ClientDataError: it is no data set whose rows can be counted and read by index.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise ClientDataError(
            "the data is a DataLoader: give its dataset; per_client_batch_size and data_collator "
            "make the batches"
        )
    if isinstance(dataset, Mapping) and any(hasattr(v, "column_names") for v in dataset.values()):
        raise ClientDataError(
            f"the data is a {kind} of the splits {list(dataset)}: give one of them, or a part of it"
        )
    if isinstance(dataset, Mapping) or hasattr(dataset, "iloc"):
        raise ClientDataError(
            f"the data is a {kind}, which holds columns, not rows: give a TensorDataset, or "
            "datasets.Dataset.from_dict or from_pandas"
        )
    if isinstance(dataset, tuple) and dataset and all(isinstance(t, Tensor) for t in dataset):
        raise ClientDataError(
            f"the data is a tuple of {len(dataset)} tensors, whose rows would be the tensors: give "
            "TensorDataset(*tensors)"
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ClientDataError(
            f"the data is a {kind}, whose rows cannot be read by index: give a map-style data set "
            "(a list of its rows, datasets.Dataset.from_generator)"
        )
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):  # torch's Dataset promises no length
        raise ClientDataError(
            f"the data is a {kind} without a length: give it a __len__, its number of rows"
        ) from None


def tensors_of(dataset: Any) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """The tensors of a data set and which of their rows are its own (None: all).

    None for any data set that may have a way of its own to read a row.
    """
    if "__getitems__" in getattr(dataset, "__dict__", ()):  # DataLoader would call it
        return None
    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    if type(dataset) is Subset and (found := tensors_of(dataset.dataset)) is not None:
        own = torch.as_tensor(dataset.indices)
        return found[0], own if found[1] is None else found[1][own]
    return None


def read_rows(dataset: Any, indices: list[int]) -> list[Any]:
    """Rows as the data set itself makes them.

    Its ``__getitems__`` is used where it is as much the data set's own as its ``__getitem__``: a
    subclass that changes only the latter means all reading.
    """
    if "__getitems__" in getattr(dataset, "__dict__", ()):
        return list(dataset.__getitems__(indices))
    if type(dataset) is Subset:  # whose __getitems__ would go past that of what it is a part of
        return read_rows(dataset.dataset, [int(dataset.indices[i]) for i in indices])
    own = next((c for c in type(dataset).__mro__ if _READS & vars(c).keys()), None)
    if own is not None and vars(own).get("__getitems__") is not None:
        return list(dataset.__getitems__(indices))
    return [dataset[i] for i in indices]


_READS = {"__getitem__", "__getitems__"}


def _default_collator(rows: list[Any]) -> Collator:
    row = rows[0]
    if isinstance(row, Mapping) and not any(isinstance(v, Mapping) for v in row.values()):
        return default_data_collator
    return default_collate
