"""What every factorized layer shares: its factors, composing, merging, scopes.

A layer kind (``linear.py``, ``conv.py``, ``embedding.py``, ``recurrent.py``) adds the shapes of its
weights and its forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from ..maths.compose import Half, Nonlinearity, compose
from ..maths.init import factor_std, fill_normal, half_variances, identity_start_std
from ..maths.rank import ParameterizationName
from ._peft import in_out_features, quantization_backend_of
from .config import ComputePath, FedParaConfig
from .errors import ReplacedWeightError
from .merged import MergedLayer
from .mixed_batch import BASE, UnreadableWeight, check_names
from .plan import WeightPlan, WeightShape
from .scaled import ScaledLayer

#: Containers of the factors, per half in the order x, y, t; each maps adapter to weight to factor.
#: No name ends in a digit: PEFT matches ``modules_to_save`` by the end of a name.
HALF_CONTAINERS = (
    ("fedpara_w1_x", "fedpara_w1_y", "fedpara_w1_t"),
    ("fedpara_w2_x", "fedpara_w2_y", "fedpara_w2_t"),
)


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of one adapter on one layer."""

    plans: Mapping[str, WeightPlan]
    parameterization: ParameterizationName
    nonlinearity: Nonlinearity
    replaced: bool
    rank_dropout: float
    module_dropout: float
    compute_path: ComputePath

    @property
    def num_halves(self) -> int:
        """Halves that a weight is composed of."""
        return 1 if self.parameterization == "lowrank" else 2

    @property
    def identity_half(self) -> int:
        """Index of the half whose Y is zero at an identity start (W₂ + 1 has no zero)."""
        return 1 if self.parameterization == "fedpara" else 0


@dataclass(frozen=True)
class ComposedWeight:
    """A composed weight that took part in a forward pass, with what it was composed from."""

    weight: Tensor
    halves: tuple[Half, ...]
    recompose: Callable[[Sequence[Half]], Tensor]


class FedParaLayer(nn.Module, MergedLayer, ScaledLayer, BaseTunerLayer):
    """A layer whose weights are factorized.

    Args:
        base_layer: the wrapped layer (or another tuner's layer around it).
        adapter_name: name of the first adapter.
        config: its configuration.
        plans: the weights to factorize, from :func:`~fedpara_peft.tuner.plan.plan_layer`.
        alpha: numerator of the scale ``alpha / r``; None means scale 1.
    """

    adapter_layer_names: tuple[str, ...] = HALF_CONTAINERS[0] + HALF_CONTAINERS[1]
    other_param_names: tuple[str, ...] = ("r", "alpha", "scaling", "specs")
    kind: ClassVar[str]

    if TYPE_CHECKING:  # PEFT is not typed; without this all of its methods would be tensors

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
        for container in self.adapter_layer_names:
            setattr(self, container, nn.ModuleDict())
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._zeroed: dict[str, tuple[float, int]] = {}
        self.specs: dict[str, AdapterSpec] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scales: dict[str, float] = {}
        self.cast_input_dtype_enabled = True
        self._fresh_local: set[str] = set()
        self._trained: set[str] | None = None  # factors to train again when adapters come back on
        self._in_mixed_batch: str | None = None  # the layer's name while it is
        self._recording: tuple[str, dict[str, ComposedWeight]] | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, plans=plans, alpha=alpha)

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

    # Factors.

    def update_layer(
        self,
        adapter_name: str,
        config: FedParaConfig,
        plans: Mapping[str, WeightPlan],
        alpha: float | None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter."""
        spec = AdapterSpec(
            plans=dict(plans),
            parameterization=config.parameterization,
            nonlinearity=config.nonlinearity,
            replaced=config.base_weight == "replaced",
            rank_dropout=config.rank_dropout,
            module_dropout=config.module_dropout,
            compute_path=config.compute_path,
        )
        self.specs[adapter_name] = spec
        # The weights of a recurrent layer may differ in rank under γ; the scale is the layer's.
        self.r[adapter_name] = max(plan.r for plan in plans.values())
        self.alpha[adapter_name] = self.r[adapter_name] if alpha is None else alpha
        self.scaling[adapter_name] = self.alpha[adapter_name] / self.r[adapter_name]
        for containers in HALF_CONTAINERS[: spec.num_halves]:
            for position, container in enumerate(containers):
                factors = {
                    name: nn.Parameter(torch.empty(_factor_shape(plan, position)))
                    for name, plan in plans.items()
                    if position < 2 or plan.kernel
                }
                if factors:
                    getattr(self, container)[adapter_name] = nn.ParameterDict(factors)
        self.reset_adapter_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Draw the factors anew from torch's global generator.

        A replaced weight gets the variance documented for its kind; beside a frozen one the
        factors are drawn so that ΔW's first step is LoHa's (see :func:`identity_start_std`).
        """
        spec = self.specs[adapter_name]
        for name in spec.plans:
            self._draw(adapter_name, name, range(spec.num_halves))
            halves = self.halves(adapter_name, name)
            if init_weights and not spec.replaced:
                nn.init.zeros_(halves[spec.identity_half].y)
                if spec.parameterization == "pfedpara":  # W₁ = 0 is the identity; W₂ = 0 is neutral
                    nn.init.zeros_(halves[1].y)
        self._fresh_local.add(adapter_name)

    def keep_local_half(self, adapter_name: str) -> None:
        """Note that a checkpoint without the personal half must not reset it."""
        self._fresh_local.discard(adapter_name)

    def has_fresh_local_half(self, adapter_name: str) -> bool:
        """Whether the personal half is as it was drawn: neither trained nor loaded."""
        return adapter_name in self._fresh_local

    def reset_local_half(self, adapter_name: str) -> None:
        """Draw the personal half W₂ anew so that W₂ = 0: neutral, because W₂ + 1 = 1."""
        for name in self.specs[adapter_name].plans:
            self._draw(adapter_name, name, (1,))
            nn.init.zeros_(self.halves(adapter_name, name)[1].y)

    def halves(self, adapter_name: str, name: str = "weight") -> tuple[Half, ...]:
        """The factors of one weight, one :class:`Half` per half."""
        found = []
        for containers in HALF_CONTAINERS[: self.specs[adapter_name].num_halves]:
            x, y, t = (getattr(self, container) for container in containers)
            kernel = self.specs[adapter_name].plans[name].kernel
            core = _factor(t[adapter_name], name) if kernel else None
            found.append(Half(_factor(x[adapter_name], name), _factor(y[adapter_name], name), core))
        return tuple(found)

    def local_containers(self, adapter_name: str) -> tuple[str, ...]:
        """Containers whose factors stay on the client: pFedPara's W₂."""
        spec = self.specs.get(adapter_name)
        personal = spec is not None and spec.parameterization == "pfedpara"
        return HALF_CONTAINERS[1] if personal else ()

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
        """Factor on the composed weight: ``alpha / r`` frozen, 1 replaced."""
        return 1.0 if self.specs[adapter_name].replaced else self.scaling[adapter_name]

    @property
    def replaced(self) -> bool:
        """Whether the base weight is replaced rather than frozen."""
        return any(spec.replaced for spec in self.specs.values())

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
            return self._noting_gradients(next(iter(self.specs)), name)
        base: Tensor = super().weight if name == "weight" else getattr(self.get_base_layer(), name)
        if self._in_mixed_batch is not None:
            return UnreadableWeight.like(base, self._in_mixed_batch)
        if self._base_alone() or self.quantization_backend is not None:
            return base
        names = [n for n in self._unmerged() if name in self.specs[n].plans]
        return self._plus_deltas(base, name, self._kept(names), self._noting_gradients)

    def _plus_deltas(
        self,
        base: Tensor,
        name: str,
        adapters: Iterable[str],
        delta_of: Callable[[str, str], Tensor],
    ) -> Tensor:
        """A base weight with the adapters' ΔW on it, dropped output features left out."""
        total = base
        for adapter_name in adapters:
            delta = delta_of(adapter_name, name)
            p = self.specs[adapter_name].rank_dropout if self.training else 0.0
            if p:
                mask = inverted_mask(delta, delta.shape[self.feature_dim], p)
                ones = [1] * (delta.dim() - self.feature_dim - 1)
                delta = delta * mask.view(-1, *ones)
            total = total + delta
        return total.to(base.dtype)

    def _noting_gradients(self, adapter_name: str, name: str) -> Tensor:
        """ΔW; once a gradient comes back to it, the personal half is no longer as it was drawn."""
        delta = self.get_delta_weight(adapter_name, name)
        if delta.requires_grad and self.training and adapter_name in self._fresh_local:
            delta.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self._fresh_local.discard(adapter_name)
            )
        return delta

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
        return [n for n in names if not _chance(self.specs[n].module_dropout)]

    def _adapters_to_run(self) -> list[str]:
        names = self._unmerged()
        if self.training and self._fresh_local:
            self._fresh_local.difference_update(names)
        return self._kept(names)

    def _forward_mixed(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any
    ) -> Tensor:
        """The base layer's output, and on each sample's the ΔW of that sample's adapter."""
        check_names(self, adapter_names, self._batch_size(x))
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name != BASE and name in self.specs:
                at = [i for i, other in enumerate(adapter_names) if other == name]
                index = torch.tensor(at, device=result.device)
                part = self._with_delta(result[index], x[index.to(x.device)], name)
                result = result.index_copy(0, index, part.to(result.dtype))
        return result

    def _batch_size(self, x: Any) -> int | None:
        """Samples in an input, None where it is not batched."""
        return int(x.shape[0]) if x.dim() > 1 else None

    def _with_delta(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """``result`` with what one adapter adds to it, in inference."""
        raise NotImplementedError

    # What PEFT expects of a layer.

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters on or off; a replaced weight cannot be turned off.

        Back on, they train again if they did before: PEFT itself would train adapters that were
        loaded for inference.
        """
        if enabled == (not self.disable_adapters):
            return
        if not enabled:
            self._refuse_if_replaced(
                "disabling adapters", "the factors are the weight; build the plain model instead"
            )
            self._trained = {name for name, p in self._factors() if p.requires_grad}
            super().enable_adapters(False)
            return
        trained, self._trained = self._trained, None
        super().enable_adapters(True)
        if trained is not None:
            for name, factor in self._factors():
                factor.requires_grad_(name in trained)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters, which train unless ``inference_mode``."""
        self._trained = None
        super().set_adapter(adapter_names, inference_mode)

    def _factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        for container in self.adapter_layer_names:
            for name, factor in getattr(self, container).named_parameters():
                yield f"{container}.{name}", factor

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; a replaced weight cannot be removed."""
        if adapter_name in self.specs:
            self._refuse_if_replaced(
                "delete_adapter", "the factors are the weight; use merge_and_unload() first"
            )
        super().delete_adapter(adapter_name)
        self._zeroed.pop(adapter_name, None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may approximate this adapter by a LoRA: matrices over a frozen weight."""
        return self.kind == "linear" and not self.replaced

    def __repr__(self) -> str:
        """As PEFT's own layers: ``get_layer_status()`` shows the method's name."""
        return "fedpara." + super().__repr__()

    def extra_repr(self) -> str:
        """Name the quantization back-end."""
        return quantization_extra_repr(self)

    # Private.

    def _compose(
        self,
        adapter_name: str,
        name: str,
        halves: Sequence[Half],
        base: Tensor | None = None,
    ) -> Tensor:
        """The composed weight in the base layer's layout, added to ``base`` if given."""
        spec = self.specs[adapter_name]
        plan = spec.plans[name]
        if base is not None:
            base = (base.T if self.transposed else base).reshape(
                plan.rows, plan.columns, *plan.kernel
            )
        weight = compose(
            halves,
            spec.parameterization,
            spec.nonlinearity,
            scale=self.scale_of(adapter_name),
            base=base,
        )
        if self.zero_row is not None:
            weight = weight.index_fill(0, torch.tensor([self.zero_row], device=weight.device), 0)
        if self.transposed:
            return weight.T
        shape = plan.shape
        return weight.reshape(shape.out_features, shape.in_features, *shape.kernel)

    def _refuse_if_replaced(self, what: str, instead: str) -> None:
        if self.replaced:
            raise ReplacedWeightError(f"{what} is not possible: base_weight='replaced', {instead}")

    def _draw(self, adapter_name: str, name: str, which: Iterable[int]) -> None:
        spec = self.specs[adapter_name]
        for index in which:
            std = self._factor_std(spec, spec.plans[name], index)
            for factor in self.halves(adapter_name, name)[index].tensors():
                fill_normal(factor, std)

    @staticmethod
    def _factor_std(spec: AdapterSpec, plan: WeightPlan, index: int) -> float:
        kernel = bool(plan.kernel)
        if not spec.replaced:
            fan_in = plan.shape.numel // plan.shape.out_features
            return identity_start_std(plan.r, fan_in, spec.parameterization, kernel=kernel)
        variances = half_variances(plan.shape.variance, spec.parameterization, spec.nonlinearity)
        return factor_std(variances[index], plan.r, kernel=kernel, nonlinearity=spec.nonlinearity)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        # Recurrent layers have no `weight`, and a freed one says nothing.
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            for parameter in base_layer.parameters():
                return parameter.device, parameter.dtype
        return device, dtype


def _factor_shape(plan: WeightPlan, position: int) -> tuple[int, ...]:
    return ((plan.rows, plan.r), (plan.columns, plan.r), (plan.r, plan.r, *plan.kernel))[position]


def _factor(factors: nn.ParameterDict, name: str) -> Tensor:
    """A factor; of a model that accelerate offloads, from where its hook keeps the values.

    Hooks bring a module's weights back before its forward, which a dictionary of factors has not.
    """
    factor: Tensor = factors[name]
    hook: Any = getattr(factors, "_hf_hook", None) if factor.is_meta else None
    kept = getattr(hook, "weights_map", None)
    return factor if kept is None else kept[name].to(hook.execution_device)


def _chance(p: float) -> bool:
    return p > 0 and bool(torch.rand(()) < p)


def inverted_mask(like: Tensor, size: int, p: float) -> Tensor:
    """Keep with probability 1 - p, scaled by 1 / (1 - p): right in the mean, 0 when all drop."""
    if p == 1:
        return like.new_zeros(size)
    return torch.empty(size, dtype=like.dtype, device=like.device).bernoulli_(1 - p) / (1 - p)
