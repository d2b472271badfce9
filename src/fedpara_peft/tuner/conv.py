"""Convolutions: ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .layer import FedParaLayer, _inverted_mask
from .plan import WeightShape


class Conv(FedParaLayer):
    """FedPara for convolutions: Prop. 3 for kernels, Prop. 1 for 1x1 ones.

    A fresh kernel has the He variance ``2 / (N K)``, N the input channels of a group.
    """

    kind = "conv"

    @staticmethod
    def weights_of(base_layer: nn.Module) -> dict[str, WeightShape]:
        """M = output channels, N = input channels of one group, and the kernel size."""
        assert isinstance(base_layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        n = base_layer.in_channels // base_layer.groups
        kernel = tuple(base_layer.kernel_size)
        fan_in = n * math.prod(kernel)
        return {"weight": WeightShape(base_layer.out_channels, n, kernel, variance=2 / fan_in)}

    def _delta_output(self, x: Tensor, adapter_name: str) -> Tensor:
        weight = self.get_delta_weight(adapter_name)
        x = self._cast_input_dtype(x, weight.dtype)
        # The base layer's own method, for its stride, padding mode, dilation and groups.
        return self.get_base_layer()._conv_forward(x, weight, None)

    def _forward_replaced(self, x: Tensor, adapter_name: str) -> Tensor:
        base_layer = self.get_base_layer()
        weight = self.get_delta_weight(adapter_name).to(x.dtype)
        return base_layer._conv_forward(x, weight, base_layer.bias)

    def _drop_output_features(self, delta: Tensor, p: float) -> Tensor:
        spatial = len(self.get_base_layer().kernel_size)
        mask = _inverted_mask(delta, delta.shape[-spatial - 1], p)
        return delta * mask.view(-1, *[1] * spatial)
