"""Exact conversions of FedPara adapters to LoRA and LoHa, and back from LoHa.

Nothing is approximated. Where there is no exact form the conversion is refused; each layer kind
answers for itself (``lora_factors``, ``loha_factors``).
"""

from .from_loha import loha_to_fedpara
from .loha import save_as_loha
from .lora import save_as_lora

__all__ = ["loha_to_fedpara", "save_as_loha", "save_as_lora"]
