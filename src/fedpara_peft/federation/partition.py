"""Dividing a data set among clients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from .errors import PartitionError
from .random import numpy_generator

Indices = list[np.ndarray]


def partition(
    dataset: Any, scheme: str | Any, num_clients: int, seed: int = 0, **scheme_args: Any
) -> list[Any]:
    """Divide a data set among clients.

    Schemes:
        ``"iid"``: a random split into equal parts (sizes differ by at most one).
        ``"dirichlet"``: each class is split by a draw from Dirichlet(``concentration``); small
            values give clients few classes. Arguments: ``concentration`` (default 0.5) and
            ``min_examples`` (default 1; clients below it receive examples of the largest ones).
        ``"classes_per_client"``: a client holds at most ``classes`` (default 2) classes; a class is
            split evenly among its holders.
        ``"column"``: a client per value of ``column`` (a role, a writer), ``num_clients`` of them
            drawn among those with at least ``min_examples`` (default 1); the rest is left out.
        ``"quantity"``: client sizes follow Dirichlet(``concentration``, default 0.5), labels do
            not matter; ``min_examples`` as above.
        a flwr-datasets partitioner: any object with ``dataset`` and ``load_partition``.

    ``"dirichlet"`` and ``"classes_per_client"`` take ``label_column`` (default ``"label"``) or
    ``labels`` (a sequence).

    Args:
        dataset: a ``datasets.Dataset`` or a map-style torch data set.
        scheme: one of the above.
        num_clients: number of clients.
        seed: seed of the draw; the same arguments give the same partition.
        **scheme_args: arguments of the scheme.

    Returns:
        One data set per client (``Dataset.select`` or ``Subset``), none empty, none overlapping.

    Raises:
        PartitionError: unknown scheme or argument, or fewer examples than clients need.
    """
    if num_clients < 1:
        raise PartitionError(f"num_clients must be at least 1, got {num_clients}")
    if hasattr(scheme, "load_partition"):
        return _by_partitioner(dataset, scheme, num_clients)
    if not isinstance(scheme, str) or scheme not in _SCHEMES:
        raise PartitionError(f"unknown scheme {scheme!r}: use one of {sorted(_SCHEMES)}")
    rng = numpy_generator(seed, scheme, "partition")
    try:
        indices = _SCHEMES[scheme](dataset, num_clients, rng, **scheme_args)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise PartitionError(f"scheme {scheme!r}: {error}") from None
    return [subset(dataset, part) for part in indices]


def subset(dataset: Any, indices: np.ndarray) -> Any:
    """The rows of a data set at ``indices``."""
    if hasattr(dataset, "select"):
        return dataset.select(indices)
    return Subset(dataset, indices.tolist())


def labels_of(dataset: Any, label_column: str = "label", labels: Any = None) -> np.ndarray:
    """The labels of a data set as an integer code per example.

    Raises:
        PartitionError: no labels were found, or not one per example.
    """
    if labels is None:
        if hasattr(dataset, "column_names"):
            if label_column not in dataset.column_names:
                raise PartitionError(
                    f"no column {label_column!r}; the data set has {dataset.column_names}: give "
                    "label_column"
                )
            labels = dataset.with_format(None)[label_column]
        elif isinstance(dataset, TensorDataset):
            labels = dataset.tensors[-1]
        elif isinstance(dataset, Subset):  # of a random_split, say
            labels = labels_of(dataset.dataset, label_column)[dataset.indices]
        elif hasattr(dataset, "targets"):
            labels = dataset.targets
        else:
            raise PartitionError(
                f"{type(dataset).__name__} has no columns, tensors or targets to read labels "
                "from: give labels=[…], one per example"
            )
    values = labels.numpy() if isinstance(labels, torch.Tensor) else np.asarray(list(labels))
    if values.shape != (len(dataset),):
        raise PartitionError(
            f"labels have shape {values.shape}, the data set {len(dataset)} examples: give one "
            "label per example"
        )
    return np.unique(values, return_inverse=True)[1]


def _iid(dataset: Any, num_clients: int, rng: np.random.Generator) -> Indices:
    _check_enough(len(dataset), num_clients, 1)
    return [np.sort(p) for p in np.array_split(rng.permutation(len(dataset)), num_clients)]


def _dirichlet(
    dataset: Any,
    num_clients: int,
    rng: np.random.Generator,
    concentration: float = 0.5,
    min_examples: int = 1,
    label_column: str = "label",
    labels: Sequence[Any] | None = None,
) -> Indices:
    if not concentration > 0:
        raise PartitionError(f"concentration must be positive, got {concentration}")
    codes = labels_of(dataset, label_column, labels)
    _check_enough(len(codes), num_clients, min_examples)
    owner = np.empty(len(codes), dtype=np.int64)
    for code in range(codes.max() + 1):
        members = rng.permutation(np.flatnonzero(codes == code))
        cuts = _cuts(num_clients, concentration, members, rng)
        for client, part in enumerate(np.split(members, cuts)):
            owner[part] = client
    return _split_by_owner(_fill_up(owner, num_clients, min_examples, rng), num_clients)


def _classes_per_client(
    dataset: Any,
    num_clients: int,
    rng: np.random.Generator,
    classes: int = 2,
    label_column: str = "label",
    labels: Sequence[Any] | None = None,
) -> Indices:
    codes = labels_of(dataset, label_column, labels)
    num_classes = int(codes.max()) + 1
    if not 1 <= classes <= num_classes:
        raise PartitionError(f"classes must be in [1, {num_classes}], got {classes}")
    if num_clients * classes < num_classes:
        raise PartitionError(
            f"{num_clients} clients with {classes} classes each cannot hold all {num_classes}: "
            "use more clients or classes"
        )
    owner = np.empty(len(codes), dtype=np.int64)
    for code, holders in enumerate(_deal(num_classes, num_clients, classes, rng)):
        members = rng.permutation(np.flatnonzero(codes == code))
        if len(members) < len(holders):
            raise PartitionError(
                f"a class of {len(members)} examples is dealt to {len(holders)} clients: use fewer "
                "clients"
            )
        for client, part in zip(holders, np.array_split(members, len(holders)), strict=True):
            owner[part] = client
    return _split_by_owner(owner, num_clients)


def _deal(
    num_classes: int, num_clients: int, classes: int, rng: np.random.Generator
) -> list[list[int]]:
    """Holders of every class; each client gets the ``classes`` that have the fewest so far."""
    holders: list[list[int]] = [[] for _ in range(num_classes)]
    for client in rng.permutation(num_clients):
        order = sorted(range(num_classes), key=lambda c: (len(holders[c]), rng.random()))
        for code in order[:classes]:
            holders[code].append(int(client))
    return holders


def _column(
    dataset: Any,
    num_clients: int,
    rng: np.random.Generator,
    column: str | None = None,
    min_examples: int = 1,
) -> Indices:
    if column is None:
        raise PartitionError("scheme 'column' needs column=…, the name of the column")
    if column not in getattr(dataset, "column_names", ()):
        raise PartitionError(
            f"the data set has no column {column!r}, it has "
            f"{getattr(dataset, 'column_names', 'no columns')}: give the name of one"
        )
    codes = labels_of(dataset, column)
    sizes = np.bincount(codes)
    large = np.flatnonzero(sizes >= min_examples)
    if len(large) < num_clients:
        raise PartitionError(
            f"column {column!r} has {len(large)} values with at least {min_examples} examples, "
            f"fewer than {num_clients} clients"
        )
    chosen = np.sort(rng.choice(large, size=num_clients, replace=False))
    return [np.flatnonzero(codes == code) for code in chosen]


def _quantity(
    dataset: Any,
    num_clients: int,
    rng: np.random.Generator,
    concentration: float = 0.5,
    min_examples: int = 1,
) -> Indices:
    if not concentration > 0:
        raise PartitionError(f"concentration must be positive, got {concentration}")
    _check_enough(len(dataset), num_clients, min_examples)
    order = rng.permutation(len(dataset))
    owner = np.empty(len(order), dtype=np.int64)
    for client, part in enumerate(np.split(order, _cuts(num_clients, concentration, order, rng))):
        owner[part] = client
    return _split_by_owner(_fill_up(owner, num_clients, min_examples, rng), num_clients)


def _cuts(
    num_clients: int, concentration: float, members: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Where to cut the members so that the parts follow a draw from Dirichlet(concentration)."""
    shares = rng.dirichlet(np.full(num_clients, concentration))
    if not np.isfinite(shares).all():  # an underflow at tiny concentrations: one client has all
        shares = np.eye(num_clients)[rng.integers(num_clients)]
    return np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)


def _by_partitioner(dataset: Any, partitioner: Any, num_clients: int) -> list[Any]:
    partitioner.dataset = dataset
    number = getattr(partitioner, "num_partitions", num_clients)
    if number != num_clients:
        raise PartitionError(
            f"the partitioner makes {number} parts, num_clients is {num_clients}: give the same"
        )
    clients = [partitioner.load_partition(i) for i in range(num_clients)]
    empty = [i for i, client in enumerate(clients) if not len(client)]
    if empty:
        raise PartitionError(
            f"the partitioner left {len(empty)} clients empty, first {empty[:3]}: use another seed "
            "or min_partition_size"
        )
    return clients


def _fill_up(
    owner: np.ndarray, num_clients: int, least: int, rng: np.random.Generator
) -> np.ndarray:
    """Give every client at least ``least`` examples, taken from the largest ones, and say so."""
    sizes = np.bincount(owner, minlength=num_clients)
    poor = np.flatnonzero(sizes < least)
    for client in poor:
        while sizes[client] < least:
            donor = int(sizes.argmax())
            taken = rng.choice(np.flatnonzero(owner == donor))
            owner[taken] = client
            sizes[donor] -= 1
            sizes[client] += 1
    if len(poor):
        warnings.warn(
            f"{len(poor)} of {num_clients} clients drew fewer than {least} examples and received "
            "some from the largest clients; a larger concentration or fewer clients avoids it",
            stacklevel=4,
        )
    return owner


def _split_by_owner(owner: np.ndarray, num_clients: int) -> Indices:
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=num_clients))[:-1])


def _check_enough(examples: int, num_clients: int, least: int) -> None:
    if examples < num_clients * least:
        raise PartitionError(
            f"{examples} examples cannot give {num_clients} clients {least} each: use fewer clients"
        )


_SCHEMES: dict[str, Callable[..., Indices]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "classes_per_client": _classes_per_client,
    "column": _column,
    "quantity": _quantity,
}
