"""Convolutions: ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...maths.apply import low_rank_form
from ...maths.cost import ACCELERATOR_KERNELS
from ...maths.precision import as_given, compute_dtype
from ..config import ComputePath
from ..errors import ConfigError, ConversionError
from ..layer.dropout import inverted_mask
from ..plan import WeightShape
from .product import ProductLayer, loha_named

_INSTEAD = "put it into exclude_modules before training, or use merge_and_unload() instead"
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv(ProductLayer):
    """FedPara for convolutions: Prop. 3 for kernels, Prop. 1 for 1x1 ones.

    A fresh kernel has the He variance ``2 / (N K)``, N the input channels of a group. The low-rank
    form is a chain: 1x1 to R channels, the core, 1x1 to M channels; without a core (Prop. 1) the
    kernel is in the first stage.
    """

    kind = "conv"
    costs_on_accelerators = ACCELERATOR_KERNELS
    base_classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @staticmethod
    def weights_of(base_layer: nn.Module) -> dict[str, WeightShape]:
        """M = output channels, N = input channels of one group, and the kernel size."""
        assert isinstance(base_layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        n = base_layer.in_channels // base_layer.groups
        kernel = tuple(base_layer.kernel_size)
        fan_in = n * math.prod(kernel)
        return {"weight": WeightShape(base_layer.out_channels, n, kernel, variance=2 / fan_in)}

    @classmethod
    def check_compute_path(cls, base_layer: nn.Module, key: str, path: ComputePath) -> None:
        """The chain of convolutions would mix the groups."""
        if path == "khatri_rao" and base_layer.groups != 1:
            raise ConfigError(
                f"compute_path='khatri_rao': {key} has groups={base_layer.groups}, a grouped "
                "convolution has no low-rank form; use compute_path='auto', or put the layer into "
                "exclude_modules"
            )

    def lora_factors(self, adapter_name: str, key: str) -> dict[str, Tensor]:
        """The kernel's first stage down to R channels, and a 1x1 one up."""
        base_layer, spec = self.get_base_layer(), self.specs[adapter_name]
        if base_layer.groups != 1:
            raise ConversionError(f"{key}: LoRA has no exact form for grouped convolutions")
        # PEFT builds LoRA's convolutions from kernel size, stride and padding alone.
        kernel = spec.plans["weight"].shape.kernel
        if any(d > 1 and k > 1 for d, k in zip(base_layer.dilation, kernel, strict=True)):
            raise ConversionError(
                f"{key}: PEFT's LoRA convolves without dilation, the layer has "
                f"dilation={base_layer.dilation}; {_INSTEAD}"
            )
        _check_padding_mode(key, base_layer, "LoRA")
        a, b, core = low_rank_form(self.halves(adapter_name), spec.parameterization)
        down = b.T if core is None else torch.einsum("ab...,ib->ai...", core, b)
        down = down.reshape(down.shape[0], -1, *kernel)
        up = (self.scale_of(adapter_name) * a).reshape(*a.shape, *[1] * len(kernel))
        return {"lora_A.weight": down, "lora_B.weight": up}

    def loha_factors(self, adapter_name: str, key: str) -> dict[str, Tensor]:
        """LoHa's factors; PEFT has none for three dimensions."""
        base_layer = self.get_base_layer()
        if isinstance(base_layer, nn.Conv3d):
            return super().loha_factors(adapter_name, key)
        _check_padding_mode(key, base_layer, "LoHa")
        return loha_named(self.halves(adapter_name))

    def _positions(self, x: Tensor) -> int:
        """Output positions; padding is taken as keeping the size."""
        spatial = len(self.get_base_layer().kernel_size)
        return x.numel() // x.shape[-spatial - 1] // math.prod(self.get_base_layer().stride)

    def _form_is_possible(self) -> bool:
        return bool(self.get_base_layer().groups == 1)

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The base layer's own method, for its stride, padding mode, dilation and groups.
        return self.get_base_layer()._conv_forward(x, weight, bias)

    def _apply_form(
        self, x: Tensor, adapter_name: str, base: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        x = x.to(compute_dtype(x))
        with as_given(x.device):
            return self._chain(x, adapter_name, base, bias)

    def _chain(
        self, x: Tensor, adapter_name: str, base: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        base_layer, scale = self.get_base_layer(), self.scale_of(adapter_name)
        kernel = base_layer.kernel_size
        form = low_rank_form(self.halves(adapter_name), self.specs[adapter_name].parameterization)
        a, b = form.a.to(x.dtype), form.b.to(x.dtype)
        ones = [1] * len(kernel)
        pointwise = _CONV[len(kernel)]
        if form.core is None:
            first = b.T.reshape(b.shape[1], -1, *kernel)
            h = base_layer._conv_forward(x, first, None)
        else:
            h = pointwise(x, b.T.reshape(*b.T.shape, *ones))
            h = base_layer._conv_forward(h, form.core.to(x.dtype), None)
        bias = None if bias is None else bias.to(x.dtype)
        out = pointwise(h, (a * scale if scale != 1 else a).reshape(*a.shape, *ones), bias)
        return out if base is None else base + out

    def _batch_size(self, x: Tensor) -> int | None:
        batched = x.dim() == len(self.get_base_layer().kernel_size) + 2
        return int(x.shape[0]) if batched else None

    def _drop_output_features(self, delta: Tensor, p: float) -> Tensor:
        spatial = len(self.get_base_layer().kernel_size)
        mask = inverted_mask(delta, delta.shape[-spatial - 1], p)
        return delta * mask.view(-1, *[1] * spatial)


def _check_padding_mode(key: str, base_layer: Any, method: str) -> None:
    """PEFT's LoRA and LoHa pad with zeros, whatever the layer does."""
    if getattr(base_layer, "padding_mode", "zeros") == "zeros":
        return
    if any(base_layer._reversed_padding_repeated_twice):  # in numbers, of padding="same" as well
        raise ConversionError(
            f"{key}: PEFT's {method} pads with zeros, the layer has "
            f"padding_mode={base_layer.padding_mode!r}; {_INSTEAD}"
        )
