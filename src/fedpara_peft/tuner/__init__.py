"""The PEFT tuner: configuration, factorized layers, the model that injects them."""

from ._peft import register
from .config import FedParaConfig
from .convert import loha_to_fedpara, save_as_loha, save_as_lora
from .jacobian import composed_weights, jacobian_correction
from .layer import FedParaLayer
from .model import FedParaModel
from .summary import fedpara_summary

register(FedParaConfig, FedParaModel, FedParaLayer)

__all__ = [
    "FedParaConfig",
    "FedParaLayer",
    "FedParaModel",
    "composed_weights",
    "fedpara_summary",
    "jacobian_correction",
    "loha_to_fedpara",
    "save_as_loha",
    "save_as_lora",
]
