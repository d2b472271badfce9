"""Errors of the maths layer, and the root of every error this package raises."""

from __future__ import annotations


class FedParaError(Exception):
    """Root of all errors raised by this package; its message names rule, value and remedy."""


class RankError(FedParaError, ValueError):
    """A rank, a rank ratio or a set of factors breaks a rule of the parameterization."""
