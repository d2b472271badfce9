"""``FedParaConfig``: what to factorize, how, and what becomes of the base weight."""

from .fedpara import ALL_SUPPORTED, HEAD_TASKS, BaseWeight, Bias, ComputePath, FedParaConfig

__all__ = [
    "ALL_SUPPORTED",
    "HEAD_TASKS",
    "BaseWeight",
    "Bias",
    "ComputePath",
    "FedParaConfig",
]
