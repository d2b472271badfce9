"""Linear layers: ``torch.nn.Linear``, transformers' ``Conv1D``, quantized linear layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..maths.apply import linear
from ..maths.precision import compute_dtype
from .plan import WeightShape
from .product import ProductLayer


class Linear(ProductLayer):
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

    @property
    def transposed(self) -> bool:
        """Transformers' Conv1D keeps its weight as ``(N, M)``."""
        return isinstance(self.get_base_layer(), Conv1D)

    @property
    def feature_dim(self) -> int:
        """Dimension of the base layer's weight that runs over the layer's output features."""
        return 1 if self.transposed else 0

    def _positions(self, x: Tensor) -> int:
        return x.numel() // x.shape[-1]

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.T if self.transposed else weight, bias)

    def _apply_form_joined(self, x: Tensor, adapter_name: str) -> Tensor:
        spec, base_layer = self.specs[adapter_name], self.get_base_layer()
        weight = base_layer.weight.T if self.transposed else base_layer.weight
        halves, scale = self.halves(adapter_name), self.scale_of(adapter_name)
        return linear(x, halves, spec.parameterization, scale, weight=weight, bias=base_layer.bias)

    def _apply_form(
        self, x: Tensor, adapter_name: str, base: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        spec = self.specs[adapter_name]
        x = x.to(compute_dtype(x))
        return linear(
            x,
            self.halves(adapter_name),
            spec.parameterization,
            self.scale_of(adapter_name),
            base=base,
            bias=None if bias is None else bias.to(x.dtype),
            keep_form=spec.replaced,
        )
