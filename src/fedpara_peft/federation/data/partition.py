"""Dividing a data set among clients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from ..errors import ClientDataError, PartitionError
from ..random import derived_seed, numpy_generator, seeded
from .batches import count_rows, read_rows, tensors_of
from .labels import label_name, labels_of_batch

Indices = list[np.ndarray]
_ROWS_AT_ONCE = 256


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

    ``"dirichlet"`` and ``"classes_per_client"`` take ``label_column`` (by default the only one with
    a usual name: labels, label, y, target, class, …) or ``labels`` (a sequence). Columns, tensors
    and ``targets`` are read at once; a data set that makes its rows itself (a subclass with a
    ``__getitem__`` of its own, a transform of labels) is read row by row.

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
    try:
        count_rows(dataset)
    except ClientDataError as error:
        raise PartitionError(str(error)) from None
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


def labels_of(dataset: Any, label_column: str | None = None, labels: Any = None) -> np.ndarray:
    """The labels of a data set as an integer code per example.

    Raises:
        PartitionError: no labels were found, or not one per example.
    """
    try:
        found = _stored_labels(dataset, label_column) if labels is None else labels
        if found is None:
            found = _labels_of_rows(dataset, label_column)
    except ClientDataError as error:
        raise PartitionError(str(error)) from None
    try:
        values = np.asarray(found.cpu() if isinstance(found, torch.Tensor) else list(found))
        codes = np.unique(values, return_inverse=True)[1]
    except (TypeError, ValueError) as error:
        raise PartitionError(
            f"labels cannot be told apart ({error}): give one number or text per example, and "
            "leave out those that have none"
        ) from None
    if values.shape not in ((len(dataset),), (len(dataset), 1)):
        raise PartitionError(
            f"labels have shape {values.shape}, the data set {len(dataset)} examples: give one "
            "label per example"
        )
    return codes.reshape(-1)


def _stored_labels(dataset: Any, label_column: str | None) -> Any:
    """Labels that are read at once; None where only the rows themselves tell."""
    if "__getitems__" in getattr(dataset, "__dict__", ()):
        return None
    if (columns := getattr(dataset, "column_names", None)) is not None:
        kind = type(dataset)
        plain = kind.__module__.partition(".")[0] == "datasets"
        if not plain or dataset.format["type"] == "custom":  # a transform may change labels
            return None
        name = label_name(columns, label_column)
        if name is None:
            raise PartitionError(
                f"no column of labels; the data set has {columns}: give label_column, or labels=[…]"
            )
        return dataset.with_format(None)[name]
    if type(dataset) is Subset:  # of a random_split, say
        whole = _stored_labels(dataset.dataset, label_column)
        return None if whole is None else np.asarray(whole)[np.asarray(dataset.indices)]
    if (tensors := tensors_of(dataset)) is not None:
        return tensors[0][-1]
    targets = getattr(dataset, "targets", None)
    if targets is None or isinstance(dataset, Subset) or len(targets) != len(dataset):
        return None
    return targets if _tells(dataset, targets) else None


def _tells(dataset: Any, targets: Any) -> bool:
    """Whether a torch data set's rows have the labels of its ``targets``."""
    joint = getattr(dataset, "transforms", None)  # torchvision's, of image and target together
    transform = getattr(joint, "target_transform", joint)
    if transform is not None or getattr(dataset, "target_transform", None) is not None:
        return False
    some = np.linspace(0, len(dataset) - 1, min(16, len(dataset)), dtype=int).tolist()
    seen = _read(dataset, some, None)
    return np.array_equal(np.ravel(seen), np.ravel([np.asarray(targets[i]) for i in some]))


def _labels_of_rows(dataset: Any, label_column: str | None) -> list[Any]:
    found: list[Any] = []
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        indices = list(range(start, min(start + _ROWS_AT_ONCE, len(dataset))))
        found += _read(dataset, indices, label_column)
    return found


def _read(dataset: Any, indices: list[int], label_column: str | None) -> list[Any]:
    """Labels of these rows; what transforms draw for them is no draw of the caller's."""
    with seeded(derived_seed(0, "labels", *indices[:1])):
        labels = [labels_of_batch(row, label_column) for row in read_rows(dataset, indices)]
    if any(label is None for label in labels):
        raise PartitionError(
            f"{type(dataset).__name__} has no columns, tensors or targets to read labels from, and "
            "its rows are no pairs or mappings with labels: give labels=[…], one per example"
        )
    return [np.asarray(label).item() if np.size(label) == 1 else label for label in labels]


def _iid(dataset: Any, num_clients: int, rng: np.random.Generator) -> Indices:
    _check_enough(len(dataset), num_clients, 1)
    return [np.sort(p) for p in np.array_split(rng.permutation(len(dataset)), num_clients)]


def _dirichlet(
    dataset: Any,
    num_clients: int,
    rng: np.random.Generator,
    concentration: float = 0.5,
    min_examples: int = 1,
    label_column: str | None = None,
    labels: Sequence[Any] | None = None,
) -> Indices:
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
    label_column: str | None = None,
    labels: Sequence[Any] | None = None,
) -> Indices:
    codes = labels_of(dataset, label_column, labels)
    _check_enough(len(codes), num_clients, 1)
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
    stored = dataset.with_format(None)[column] if hasattr(dataset, "with_format") else None
    codes = labels_of(dataset, column, stored)
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
    if not concentration > 0:
        raise PartitionError(f"concentration must be positive, got {concentration}")
    shares = rng.dirichlet(np.full(num_clients, min(concentration, 1e12)))  # equal from there on
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
    if least < 1 or examples < num_clients * least:
        raise PartitionError(
            f"{examples} examples cannot give {num_clients} clients {least} each: use fewer "
            "clients, and min_examples of at least 1"
        )


_SCHEMES: dict[str, Callable[..., Indices]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "classes_per_client": _classes_per_client,
    "column": _column,
    "quantity": _quantity,
}
