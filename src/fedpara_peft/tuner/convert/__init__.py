"""Conversions between FedPara, LoHa and LoRA, in the layouts of the field.

Exact, or the best LoRA of a rank with its error. Where a layer has no form in the target the
conversion is refused; each layer kind answers for itself (``lora_factors``, ``loha_factors``).
"""

from .adapter import Conversion, convert_adapter
from .from_loha import loha_to_fedpara
from .layouts.writers import ConvertedLayer
from .loha import save_as_loha
from .lora import save_as_lora
from .summary import AdapterSummary, FileLayer, inspect_adapter

__all__ = [
    "AdapterSummary",
    "Conversion",
    "ConvertedLayer",
    "FileLayer",
    "convert_adapter",
    "inspect_adapter",
    "loha_to_fedpara",
    "save_as_loha",
    "save_as_lora",
]
