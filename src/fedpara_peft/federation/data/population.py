"""The clients of a run: their names and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ClientDataError, about
from .batches import count_rows

_SPLITS = {"train", "test", "validation", "valid", "val"}


class Population:
    """All clients, in a fixed order; a client is its index in it.

    Args:
        train_dataset: one data set per client, as a sequence or a mapping by client name.
        eval_dataset: likewise, what is held out of each client's data; None if nothing is.

    Attributes:
        names: the clients' names, their indices where none were given.
        train: their data sets, not copied.
        eval: what is held out of each; None if nothing is.
        num_examples: sizes of ``train``.

    Raises:
        ClientDataError: there are no clients, one has no data or none that can be counted and read
            by index, or the two do not match.
    """

    def __init__(self, train_dataset: Any, eval_dataset: Any = None) -> None:
        self.names, self.train = _named(train_dataset, "train_dataset")
        self.num_examples = _sizes(self.names, self.train)
        self.eval: Sequence[Any] | None = None
        if eval_dataset is not None:
            given, data = _named(eval_dataset, "client_eval_dataset")
            if isinstance(eval_dataset, Mapping):
                data = [eval_dataset[name] for name in self.names if name in eval_dataset]
            if len(data) != len(self.names):
                raise ClientDataError(
                    f"client_eval_dataset has {len(given)} data sets ({_shown(given)}) for "
                    f"{len(self.names)} clients ({_shown(self.names)}): give one for each, by the "
                    "same names"
                )
            _sizes(self.names, data)
            self.eval = data

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: Any) -> int:
        """The index of a client.

        Raises:
            ClientDataError: there is none of this name.
        """
        if name not in self.names:
            raise ClientDataError(
                f"there is no client {name!r}: the clients are {_shown(self.names)}"
            )
        return self.names.index(name)


def _named(datasets: Any, argument: str) -> tuple[Sequence[Any], Sequence[Any]]:
    names: Sequence[Any]
    clients: Sequence[Any]
    if isinstance(datasets, Mapping) and datasets.keys() and datasets.keys() <= _SPLITS:
        raise ClientDataError(
            f"{argument} has the keys {list(datasets)}, which are splits, not clients: divide one "
            "of them with partition(…)"
        )
    if isinstance(datasets, Mapping):
        names, clients = [_name(key, argument) for key in datasets], list(datasets.values())
    elif isinstance(datasets, Sequence):
        names, clients = range(len(datasets)), datasets
    else:
        raise ClientDataError(
            f"{argument} is a {type(datasets).__name__}: give a list or mapping with one data set "
            "per client, e.g. from partition(…)"
        )
    if not names:
        raise ClientDataError(f"there are no clients: {argument} is empty")
    return names, clients


def _name(key: Any, argument: str) -> Any:
    """A client's name, as it is written into checkpoints and read from them again."""
    if isinstance(key, np.generic):
        key = key.item()
    if isinstance(key, tuple):
        return tuple(_name(part, argument) for part in key)
    if key is None or type(key) in (str, int, float, bool):
        return key
    raise ClientDataError(
        f"{argument} has a client named {key!r}, of type {type(key).__name__}, which a checkpoint "
        "would not give back: let names be texts, numbers or tuples of them"
    )


def _sizes(names: Sequence[Any], datasets: Sequence[Any]) -> list[int]:
    sizes = []
    for name, data in zip(names, datasets, strict=True):
        with about(name):
            sizes.append(count_rows(data))
    empty = [name for name, size in zip(names, sizes, strict=True) if not size]
    if empty:
        raise ClientDataError(
            f"{len(empty)} clients have no data, first {empty[:3]}: leave them out, or use "
            "partition(…), which gives every client at least one example"
        )
    return sizes


def _shown(names: Sequence[Any]) -> str:
    return f"{list(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
