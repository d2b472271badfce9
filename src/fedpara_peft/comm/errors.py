"""Errors of the communication layer."""

from __future__ import annotations

from typing import Literal

from ..maths.errors import FedParaError

Refusal = Literal[
    "malformed",
    "length",
    "codec",
    "schema",
    "keys",
    "shape",
    "dtype",
    "not_finite",
    "norm",
    "stale",
    "duplicate",
    "behind",
    "not_sampled",
    "diverged",
    "failed",
    "unsummed",
]


class StateError(FedParaError, ValueError):
    """A state does not fit the model it is loaded into; the model is unchanged."""


class CodecError(FedParaError, ValueError):
    """A codec does not exist, or cannot be used for what it is asked."""


class SecureAggregationError(FedParaError, RuntimeError):
    """A sum cannot be made without showing what it is of: it is not made, nothing is revealed."""


class PayloadError(FedParaError, ValueError):
    """Bytes that arrived are not the state that was agreed on; nothing of them is used.

    Attributes:
        reason: which check refused them.
    """

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(f"payload refused ({reason}): {message}")
        self.reason = reason
