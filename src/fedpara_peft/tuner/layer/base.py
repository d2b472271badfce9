"""What every factorized layer shares: composing its weights, and what a kind says about itself.

A layer kind (``tuner/kinds``) adds the shapes of its weights and its forward pass. What a layer
holds is in ``factors.py``, what PEFT asks of it in ``switches.py``, ``scaled.py``, ``merged.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...maths.compose import Half, compose
from .._peft import in_out_features, quantization_backend_of
from ..config import ComputePath, FedParaConfig
from ..errors import ConversionError
from ..plan import WeightPlan, WeightShape
from .dropout import chance, inverted_mask
from .factors import FactorHolder
from .merged import MergedLayer
from .mixed_batch import UnreadableWeight
from .remainder import REMAINDER_CONTAINER, RemainderLayer
from .scaled import ScaledLayer
from .seeded import SeededLayer
from .switches import ShownModule, SwitchedLayer

#: What a kind says of its forward pass, and inherits with it alone.
_OF_THE_FORWARD = ("mixes_adapters", "lora_factors", "loha_factors", "supports_lora_conversion")


@dataclass(frozen=True)
class ComposedWeight:
    """A composed weight that took part in a forward pass, with what it was composed from."""

    weight: Tensor
    halves: tuple[Half, ...]
    recompose: Callable[[Sequence[Half]], Tensor]


class FedParaLayer(
    ShownModule, FactorHolder, RemainderLayer, SeededLayer, MergedLayer, ScaledLayer, SwitchedLayer
):
    """A layer whose weights are factorized.

    Args:
        base_layer: the wrapped layer (or another tuner's layer around it).
        adapter_name: name of the first adapter.
        config: its configuration.
        plans: the weights to factorize, from :func:`~fedpara_peft.tuner.plan.plan_layer`.
        alpha: numerator of the scale ``alpha / r``; None means scale 1.
    """

    other_param_names: tuple[str, ...] = ("r", "alpha", "scaling", "specs", REMAINDER_CONTAINER)
    #: What summaries and errors call it.
    kind: ClassVar[str]
    #: The classes of the layers that it factorizes; see ``tuner/kinds``.
    base_classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    #: Whether ``forward`` takes ``adapter_names``; without, a batch with them is refused.
    mixes_adapters: ClassVar[bool] = False

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: FedParaConfig,
        plans: Mapping[str, WeightPlan],
        alpha: float | None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend_of(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.in_features, self.out_features = self.features_of(self.get_base_layer())
        for half in range(2):
            self._add_containers(half)
        self.fedpara_remainder = nn.ModuleDict()
        self.r = {}
        self.alpha = {}
        self.scaling = {}
        self._rank_stabilized: dict[str, bool] = {}
        self._zeroed: dict[str, tuple[float, int]] = {}
        self._seeded_bases: dict[str, Tensor] = {}  # while adapters are merged into them
        self.specs = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scales: dict[str, float] = {}
        self.cast_input_dtype_enabled = True
        self._drawn_local: dict[str, list[Tensor]] = {}
        self._trained = None
        self._in_mixed_batch: str | None = None  # the layer's name while it is
        self._recording: tuple[str, dict[str, ComposedWeight]] | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, plans=plans, alpha=alpha)
        plain = self.get_base_layer()
        for name in getattr(plain, "__constants__", ()):  # models ask for a stride, a padding_idx
            if not hasattr(self, name) and hasattr(plain, name):
                setattr(self, name, getattr(plain, name))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A forward of its own owes answers of its own: another kind's would be of its forward."""
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            for name in _OF_THE_FORWARD:
                if name not in vars(cls):
                    setattr(cls, name, vars(FedParaLayer)[name])

    # What a layer kind says about itself.

    @staticmethod
    def weights_of(base_layer: nn.Module) -> dict[str, WeightShape]:
        """The weights of a layer of this kind that can be factorized, by name."""
        raise NotImplementedError

    @staticmethod
    def features_of(base_layer: nn.Module) -> tuple[int, int]:
        """Inputs and outputs of the layer, which PEFT shows on every tuner layer."""
        inputs, outputs = in_out_features(base_layer)
        return int(inputs), int(outputs)

    @classmethod
    def unsupported(cls, base_layer: nn.Module) -> str | None:
        """Why this very layer cannot be factorized, though it is of this kind; None if it can."""
        return None

    @classmethod
    def check_replaceable(cls, base_layer: nn.Module, key: str) -> None:
        """Raise a typed error if this very layer cannot train with its weight replaced."""

    @classmethod
    def check_compute_path(cls, base_layer: nn.Module, key: str, path: ComputePath) -> None:
        """Raise a typed error if this very layer cannot go the way that was asked for."""

    @property
    def transposed(self) -> bool:
        """Whether the base layer keeps its weight as ``(N, M)``."""
        return False

    @property
    def zero_row(self) -> int | None:
        """A row of the composed weight that counts as zero."""
        return None

    @property
    def feature_dim(self) -> int:
        """Dimension of the base layer's weight that runs over the layer's output features."""
        return 0

    def bias_names(self) -> tuple[str, ...]:
        """Names of the base layer's bias parameters."""
        return ("bias",) if getattr(self.get_base_layer(), "bias", None) is not None else ()

    # Other methods' forms; what a kind does not answer for is refused.

    def lora_factors(self, adapter_name: str, key: str) -> dict[str, Tensor]:
        """The LoRA that the adapter exactly is on this layer.

        Args:
            adapter_name: an adapter without nonlinearity.
            key: the layer's name, for the error.

        Returns:
            A and B by the names PEFT's LoRA has for them, A first; the scale is folded in.

        Raises:
            ConversionError: LoRA has no exact form for such a layer.
        """
        raise ConversionError(f"{key}: LoRA has no form for {self.kind} layers")

    def loha_factors(self, adapter_name: str, key: str) -> dict[str, Tensor]:
        """The LoHa that the adapter exactly is on this layer, by PEFT's names of its factors.

        Raises:
            ConversionError: LoHa has no exact form for such a layer.
        """
        kind = type(self.get_base_layer()).__name__
        raise ConversionError(f"{key}: LoHa has no form for {kind} layers")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may approximate this adapter by a LoRA."""
        return False

    # Composed weights.

    def get_delta_weight(self, adapter_name: str, name: str = "weight") -> Tensor:
        """The composed weight in the base layer's layout: ``(alpha / r) ΔW`` frozen, W replaced."""
        halves = self.halves(adapter_name, name)
        if self._recording is None:
            return self._compose(adapter_name, name, halves)
        prefix, found = self._recording
        key = f"{prefix}.{adapter_name}.{name}"
        if key not in found:  # a layer that is called twice has one weight, with one gradient
            recompose = functools.partial(self._compose, adapter_name, name)
            found[key] = ComposedWeight(recompose(halves), halves, recompose)
        return found[key].weight

    def scale_of(self, adapter_name: str) -> float:
        """Factor on the composed weight: ``alpha / r`` frozen, 1 from scratch."""
        return 1.0 if self.specs[adapter_name].from_scratch else self.scaling[adapter_name]

    def product(
        self,
        adapter_name: str,
        name: str,
        halves: Sequence[Half],
        scale: float,
        base: Tensor | None = None,
    ) -> Tensor:
        """``scale · P(θ)`` in the base layer's layout, added to ``base`` if given.

        Args:
            adapter_name: whose parameterization it is.
            name: the weight's.
            halves: the factors θ: the adapter's own, or others in their place.
            scale: factor on the product.
            base: in the base layer's layout.
        """
        spec = self.specs[adapter_name]
        plan = spec.plans[name]
        if base is not None:
            base = self._as_composed(base, plan)
        weight = compose(halves, spec.parameterization, spec.nonlinearity, scale=scale, base=base)
        if self.zero_row is not None:
            weight = weight.index_fill(0, torch.tensor([self.zero_row], device=weight.device), 0)
        return weight.T if self.transposed else weight.reshape(self._laid_out(plan))

    @property
    def replaced(self) -> bool:
        """Whether the layer has no weight but the composed one."""
        return any(spec.replaced for spec in self.specs.values())

    @property
    def from_scratch(self) -> bool:
        """Whether the layer has no pretrained weight: replaced, or drawn from a seed."""
        return any(spec.from_scratch for spec in self.specs.values())

    @property
    def weight(self) -> Tensor:
        """The weight that the layer applies, with its adapters in it; differentiable.

        Some models read it instead of calling the layer: ``nn.TransformerEncoder`` in inference,
        Mamba's kernels. It is composed anew at each reading. A quantized weight is the base
        layer's own: what reads it wants the packed numbers.
        """
        return self.effective_weight()

    def effective_weight(self, name: str = "weight") -> Tensor:
        """The weight of this name that the layer applies; see :attr:`weight`.

        Raises:
            MixedBatchError: something is computed with it while every sample has its own adapter.
        """
        if self.replaced and not self.merged:
            return self.get_delta_weight(next(iter(self.specs)), name)
        base: Tensor = super().weight if name == "weight" else getattr(self.get_base_layer(), name)
        if self._in_mixed_batch is not None:
            return UnreadableWeight.like(base, self._in_mixed_batch)
        if self._base_alone() or self.quantization_backend is not None:
            return base
        names = [n for n in self._unmerged() if name in self.specs[n].plans]
        return self._plus_deltas(base, name, self._kept(names))

    def _plus_deltas(self, base: Tensor, name: str, adapters: Iterable[str]) -> Tensor:
        """A base weight with the adapters' ΔW on it, dropped output features left out."""
        total = base
        for adapter_name in adapters:
            delta = self.get_delta_weight(adapter_name, name)
            p = self.specs[adapter_name].rank_dropout if self.training else 0.0
            if p:
                mask = inverted_mask(delta, delta.shape[self.feature_dim], p)
                ones = [1] * (delta.dim() - self.feature_dim - 1)
                delta = delta * mask.view(-1, *ones)
            total = total + delta
        return total.to(base.dtype)

    # Forward.

    def _drop_output_features(self, delta: Tensor, p: float) -> Tensor:
        """Inverted dropout of whole output features (the last dimension here)."""
        return delta * inverted_mask(delta, delta.shape[-1], p)

    def _base_alone(self) -> bool:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return True
        return self.merged and not self._unmerged()

    def _unmerged(self) -> list[str]:
        """The active adapters that the base weight does not hold already."""
        merged = self.merged_adapters
        return [n for n in self.active_adapters if n in self.specs and n not in merged]

    def _kept(self, names: list[str]) -> list[str]:
        """The adapters that module dropout leaves in."""
        if not self.training:
            return names
        return [n for n in names if not chance(self.specs[n].module_dropout)]

    def _adapters_to_run(self) -> list[str]:
        return self._kept(self._unmerged())

    # Private.

    def _compose(
        self,
        adapter_name: str,
        name: str,
        halves: Sequence[Half],
        base: Tensor | None = None,
    ) -> Tensor:
        """``scale · (P(θ) + R)`` in the base layer's layout, added to ``base`` if given."""
        weight = self.product(adapter_name, name, halves, self.scale_of(adapter_name), base)
        return self._plus_remainder(weight, adapter_name, name)

    def _laid_out(self, plan: WeightPlan) -> tuple[int, ...]:
        """The shape of a weight in the base layer's layout."""
        size = (plan.shape.out_features, plan.shape.in_features, *plan.shape.kernel)
        return size[::-1] if self.transposed else size
