"""Which column holds the labels: one rule, for dividing data, for the loss and for metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ClientDataError

#: Names that labels usually have.
LABEL_NAMES = (
    "labels", "label", "label_ids", "y", "target", "targets", "class", "fine_label", "coarse_label",
)  # fmt: skip
#: What transformers' collator renames to ``labels``.
_RENAMED = ("label", "label_ids")


def label_name(columns: Iterable[str], label_column: str | None = None) -> str | None:
    """The column of labels: the one asked for, else the only one with a usual name.

    Args:
        columns: names of all columns.
        label_column: the one asked for; None: find it.

    Returns:
        None if none was asked for and no name is a usual one.

    Raises:
        ClientDataError: there is no such column, or several have usual names.
    """
    names = list(columns)
    if label_column is not None:
        if label_column in names:
            return label_column
        if label_column in _RENAMED and "labels" in names:
            return "labels"
        raise ClientDataError(
            f"there is no column {label_column!r}, there are {names}: give label_column one of them"
        )
    found = [name for name in LABEL_NAMES if name in names]
    if len(found) > 1:
        raise ClientDataError(
            f"any of the columns {found} may hold the labels: say which with label_column"
        )
    return found[0] if found else None


def labels_of_batch(batch: Any, label_column: str | None = None) -> Any:
    """The labels of a batch (or of a row), None where it has none.

    Raises:
        ClientDataError: see :func:`label_name`.
    """
    if isinstance(batch, Mapping):
        name = label_name(batch, label_column)
        return None if name is None else batch[name]
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
