"""Linear layers: ``torch.nn.Linear``, transformers' ``Conv1D``, quantized linear layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...maths.apply import linear, low_rank_form
from ...maths.precision import compute_dtype
from ..plan import WeightShape
from .product import ProductLayer, loha_named


class Linear(ProductLayer):
    """FedPara for ``y = x Wᵀ + b``; a fresh weight has the He variance ``2 / N``."""

    kind = "linear"
    base_classes = (nn.Linear, Conv1D)

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

    @classmethod
    def unsupported(cls, base_layer: nn.Module) -> str | None:
        """The output projection of MultiheadAttention is never called."""
        if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "its parent MultiheadAttention reads the weight without calling the layer"
        return None

    def lora_factors(self, adapter_name: str, key: str) -> dict[str, Tensor]:
        """FedPara of rank r is a LoRA of rank r²."""
        spec = self.specs[adapter_name]
        a, b, _ = low_rank_form(self.halves(adapter_name), spec.parameterization)
        return {"lora_A.weight": b.T, "lora_B.weight": self.scale_of(adapter_name) * a}

    def loha_factors(self, adapter_name: str, key: str) -> dict[str, Tensor]:
        """LoHa's factors; PEFT has none for Conv1D and quantized layers."""
        if not isinstance(self.get_base_layer(), nn.Linear):
            return super().loha_factors(adapter_name, key)
        return loha_named(self.halves(adapter_name))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may approximate this adapter by a LoRA: matrices over a frozen weight."""
        return not self.from_scratch and self.remainder(adapter_name) is None

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
