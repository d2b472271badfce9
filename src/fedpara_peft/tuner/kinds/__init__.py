"""The layer kinds: one file and one line here for each.

A kind is a subclass of :class:`~fedpara_peft.tuner.layer.FedParaLayer` that says which layers it
factorizes (``base_classes``), which weights they have (``weights_of``), and how they are applied
(``forward``). What it does not answer for, such as a form in another method, is refused.
"""

from torch import nn

from .._peft import quantization_backend_of
from ..layer import FedParaLayer
from .conv import Conv
from .embedding import Embedding
from .linear import Linear
from .recurrent import Recurrent

#: The registry. Of two kinds for one layer the later counts.
LAYER_KINDS: list[type[FedParaLayer]] = [Linear, Conv, Embedding, Recurrent]


def kind_of(base_layer: nn.Module) -> type[FedParaLayer] | None:
    """The kind that a layer is of, whether this very layer can be factorized or not."""
    for kind in reversed(LAYER_KINDS):
        # Transposed convolutions are no subclass of the others, quantized linear layers may be.
        if isinstance(base_layer, kind.base_classes):
            return kind
    return None


def kind_for(base_layer: nn.Module) -> type[FedParaLayer] | None:
    """As :func:`kind_of`; a quantized linear layer of another library is a linear one."""
    if (kind := kind_of(base_layer)) is not None:
        return kind
    backend = quantization_backend_of(base_layer)
    return Linear if backend is not None and backend.layer_type == "linear" else None


__all__ = ["LAYER_KINDS", "Conv", "Embedding", "Linear", "Recurrent", "kind_for", "kind_of"]
