"""Errors of the federation layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..maths.errors import FedParaError


class ArgumentsError(FedParaError, ValueError):
    """A training argument has a value, or meets another argument, that it cannot have."""


class PartitionError(FedParaError, ValueError):
    """A data set cannot be divided among the clients as asked."""


class ClientDataError(FedParaError, ValueError):
    """A client's data cannot be trained on."""


class RoundError(FedParaError, RuntimeError):
    """A round cannot be completed."""


class ResumeError(FedParaError, RuntimeError):
    """A run cannot be resumed, or would overwrite one that can; nothing was changed."""


class AgreementError(FedParaError, RuntimeError):
    """The processes or nodes of a run were given different things."""


class RunFolderError(FedParaError, OSError):
    """A run's folder cannot be written; what was whole in it still is."""


@contextmanager
def about(client: Any) -> Iterator[None]:
    """Say of which client an error is."""
    try:
        yield
    except (ArgumentsError, ClientDataError) as error:
        raise type(error)(f"client {client!r}: {error}") from error.__cause__
