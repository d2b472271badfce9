"""A factorized layer: the factors it holds, composing, merging, and what PEFT asks of it."""

from .base import ComposedWeight, FedParaLayer
from .factors import FACTOR_CONTAINER, AdapterSpec, half_containers
from .remainder import REMAINDER_CONTAINER
from .walk import FactorizedWeight, factorized_layers, factorized_weights

__all__ = [
    "FACTOR_CONTAINER",
    "REMAINDER_CONTAINER",
    "AdapterSpec",
    "ComposedWeight",
    "FactorizedWeight",
    "FedParaLayer",
    "factorized_layers",
    "factorized_weights",
    "half_containers",
]
