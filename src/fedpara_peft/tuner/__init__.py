"""The PEFT tuner: configuration, factorized layers, the model that injects them."""

from ._peft import register
from .config import FedParaConfig
from .layer import FedParaLayer
from .model import FedParaModel

register(FedParaConfig, FedParaModel, FedParaLayer)

__all__ = ["FedParaConfig", "FedParaLayer", "FedParaModel"]
