"""Linear layers: ``torch.nn.Linear``, transformers' ``Conv1D``, quantized linear layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .layer import FedParaLayer
from .plan import WeightShape


class Linear(FedParaLayer):
    """FedPara for ``y = x Wᵀ + b``; a fresh weight has the He variance ``2 / N``."""

    kind = "linear"

    @staticmethod
    def weights_of(base_layer: nn.Module) -> dict[str, WeightShape]:
        """M = output features, N = input features."""
        if isinstance(base_layer, Conv1D):
            n, m = base_layer.weight.shape
        else:
            m, n = base_layer.out_features, base_layer.in_features
        return {"weight": WeightShape(int(m), int(n), variance=2 / int(n))}

    def to_base_layout(self, weight: Tensor, shape: WeightShape) -> Tensor:
        """Transformers' Conv1D keeps its weight as ``(N, M)``."""
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def _delta_output(self, x: Tensor, adapter_name: str) -> Tensor:
        weight = self.get_delta_weight(adapter_name)
        x = self._cast_input_dtype(x, weight.dtype)
        return F.linear(
            x, self.to_base_layout(weight, self.specs[adapter_name].plans["weight"].shape)
        )

    def _forward_replaced(self, x: Tensor, adapter_name: str) -> Tensor:
        weight = self.get_delta_weight(adapter_name).to(x.dtype)
        weight = self.to_base_layout(weight, self.specs[adapter_name].plans["weight"].shape)
        return F.linear(x, weight, self.get_base_layer().bias)
