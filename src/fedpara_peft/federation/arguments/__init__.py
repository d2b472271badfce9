"""The settings of a federated run."""

from .federated import FederatedArguments

__all__ = ["FederatedArguments"]
