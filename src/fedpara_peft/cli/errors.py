"""Errors of the command line."""

from __future__ import annotations

from ..maths.errors import FedParaError


class CommandError(FedParaError, ValueError):
    """A command cannot do what it was asked; nothing was written."""
