"""Linear layers: ``torch.nn.Linear``, transformers' ``Conv1D``, quantized linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..maths.apply import linear
from .plan import WeightShape
from .product import ProductLayer, compute_dtype


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
        spec, scale = self.specs[adapter_name], self.scale_of(adapter_name)
        x = x.to(compute_dtype(x))
        if torch.is_grad_enabled() or self.training:
            halves = self.halves(adapter_name)
            bias = None if bias is None else bias.to(x.dtype)
            name, keep = spec.parameterization, spec.replaced
            return linear(x, halves, name, scale, base=base, bias=bias, keep_form=keep)
        form = self._low_rank_form(adapter_name, x.dtype)
        delta = F.linear(F.linear(x, form.b.T), form.a)
        base = bias if base is None else base
        if base is None:
            return delta if scale == 1 else delta * scale
        return torch.add(base, delta, alpha=scale)
