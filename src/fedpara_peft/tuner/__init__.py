"""The PEFT tuner: configuration, factorized layers, the model that injects them."""

from ._peft import hook_into_cards, register
from .card import write_card
from .config import FedParaConfig
from .convert import (
    AdapterSummary,
    Conversion,
    ConvertedLayer,
    FileLayer,
    convert_adapter,
    inspect_adapter,
    loha_to_fedpara,
    save_as_loha,
    save_as_lora,
)
from .decay import composed_weight_decay
from .jacobian import composed_weights, jacobian_correction
from .layer import FedParaLayer
from .model import FedParaModel
from .summary import fedpara_summary

register(FedParaConfig, FedParaModel, FedParaLayer)
hook_into_cards(write_card)

__all__ = [
    "AdapterSummary",
    "Conversion",
    "ConvertedLayer",
    "FedParaConfig",
    "FedParaLayer",
    "FedParaModel",
    "FileLayer",
    "composed_weight_decay",
    "composed_weights",
    "convert_adapter",
    "fedpara_summary",
    "inspect_adapter",
    "jacobian_correction",
    "loha_to_fedpara",
    "save_as_loha",
    "save_as_lora",
]
