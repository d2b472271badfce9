"""Layers that multiply their input by one weight: which way they take.

Three ways give the same output: apply the low-rank form (no weight is composed), compose the weight
and apply it beside the base layer, or join it with the base weight for one product. The cost rule
is in ``maths/cost.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...maths.apply import for_any_batch_size, has_low_rank_form
from ...maths.compose import Half
from ...maths.cost import ACCELERATOR, PROCESSOR, Costs, operations
from ...maths.precision import autocast_dtype, output_dtype
from ..errors import UnsupportedLayerError
from ..hooks import has_hooks
from .additive import AdditiveLayer

#: LoHa's factors in the order of ours: X, Y, T of each half.
LOHA_FACTORS = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


class ProductLayer(AdditiveLayer):
    """Base of linear layers and convolutions."""

    #: For the choice between form and composing, beside a processor's.
    costs_on_accelerators: ClassVar[Costs] = ACCELERATOR

    # What a layer kind says about itself.

    @classmethod
    def check_replaceable(cls, base_layer: nn.Module, key: str) -> None:
        """A layer with a forward of its own would not be computed as it does."""
        super().check_replaceable(base_layer, key)
        if not _comes_from(type(base_layer).forward, ("torch.nn.", "transformers.pyt")):
            raise UnsupportedLayerError(
                f"{key} is a {type(base_layer).__name__} with a forward of its own, which a "
                "replaced weight would go past: use base_weight='frozen' or a plain layer"
            )

    def _positions(self, x: Tensor) -> int:
        """Rows that the weight multiplies."""
        raise NotImplementedError

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer's product with another weight (in the base layer's layout)."""
        raise NotImplementedError

    def _apply_form(
        self, x: Tensor, adapter_name: str, base: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """``base + bias + scale · x Wᵀ`` by the low-rank form; one of base and bias at most."""
        raise NotImplementedError

    def _apply_form_joined(self, x: Tensor, adapter_name: str) -> Tensor | None:
        """The low-rank form and the base layer in one, None where that gains nothing."""
        return None

    def _form_is_possible(self) -> bool:
        return True

    # Ways.

    def _forward_replaced(self, x: Tensor, adapter_name: str) -> Tensor:
        bias = self.get_base_layer().bias
        if self._takes_form(x, adapter_name, joined=False):
            return self._apply_form(x, adapter_name, None, bias).to(output_dtype(x))
        weight = self.get_delta_weight(adapter_name)
        return self._apply_weight(x, weight.to(x.dtype), bias)

    def _forward_joined(self, x: Tensor, adapter_name: str) -> Tensor | None:
        """Base layer and adapter in one product, None where they must stay apart."""
        if self._recording is not None or not self._can_join(x, adapter_name):
            return None
        if self._takes_form(x, adapter_name, joined=True):
            pays = torch.is_grad_enabled() and not for_any_batch_size()
            return self._apply_form_joined(x, adapter_name) if pays else None
        base_layer = self.get_base_layer()
        halves = self.halves(adapter_name)
        weight = self._compose(adapter_name, "weight", halves, base=base_layer.weight)
        return self._apply_weight(x, weight, base_layer.bias)

    def _with_delta(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        p = self.specs[adapter_name].rank_dropout if self.training else 0.0
        if self._takes_form(x, adapter_name, joined=False):
            if not p:
                return self._apply_form(x, adapter_name, result)
            delta = self._apply_form(x, adapter_name, None)
        else:
            weight = self.get_delta_weight(adapter_name)
            delta = self._apply_weight(self._cast_input_dtype(x, weight.dtype), weight, None)
        return result + (self._drop_output_features(delta, p) if p else delta)

    def _takes_form(self, x: Tensor, adapter_name: str, *, joined: bool) -> bool:
        spec = self.specs[adapter_name]
        possible = has_low_rank_form(spec.nonlinearity) and self._form_is_possible()
        possible = possible and not x.is_nested  # ragged: no rows to count, no view to take
        possible = possible and self.remainder(adapter_name) is None
        if not possible or self._recording is not None or spec.compute_path == "compose":
            return False
        if spec.compute_path == "khatri_rao":
            return True
        if for_any_batch_size():
            return False
        plan = spec.plans["weight"]
        by_form, by_composing = operations(
            positions=self._positions(x),
            dense=plan.shape.numel,
            form=plan.form_parameters,
            features=plan.shape.out_features + plan.shape.in_features,
            r=plan.r,
            training=torch.is_grad_enabled(),
            joined=joined,
            costs=PROCESSOR if x.device.type == "cpu" else self.costs_on_accelerators,
        )
        return by_form <= by_composing

    def _can_join(self, x: Tensor, adapter_name: str) -> bool:
        """Whether W₀ + ΔW may stand for both: a plain float weight whose layer nobody watches."""
        base_layer = self.base_layer
        weight: Any = getattr(base_layer, "weight", None)
        # FSDP shows plain tensors in place of parameters; quantized weights are subclasses.
        if type(base_layer).__module__.startswith("torch.nn.") and type(weight) in (
            nn.Parameter,
            Tensor,
        ):
            spec = self.specs[adapter_name]
            return (
                # A half-precision sum would round away what a small ΔW changes.
                weight.dtype in (torch.float32, torch.float64)
                and weight.dtype == x.dtype == self.halves(adapter_name)[0].x.dtype
                and autocast_dtype(x.device) is None
                and not (self.training and spec.rank_dropout)
                and not _is_watched(base_layer)
            )
        return False


def _is_watched(module: nn.Module) -> bool:
    """Whether calling one of torch's modules does more than torch's: hooks, a patched forward."""
    return (
        has_hooks(module)
        or "forward" in vars(module)
        or not _comes_from(type(module).forward, ("torch.nn.",))
    )


def _comes_from(forward: Any, packages: tuple[str, ...]) -> bool:
    """Whether a class's forward is still its maker's; a wrapper wears the name of the first."""
    return bool(forward.__module__.startswith(packages)) and not hasattr(forward, "__wrapped__")


def loha_named(halves: Sequence[Half]) -> dict[str, Tensor]:
    """Two halves as PEFT's LoHa keeps them, by its names."""
    found: dict[str, Tensor] = {}
    for half, names in zip(halves, LOHA_FACTORS, strict=True):
        x, y, t = half
        kept: tuple[Tensor | None, ...] = (x, y.T, None)
        if t is not None:
            # A Conv1d's core is k x 1 there.
            kept = (x.T, y.T, t.unsqueeze(-1) if t.dim() == 3 else t)
        found.update({n: f for n, f in zip(names, kept, strict=True) if f is not None})
    return found
