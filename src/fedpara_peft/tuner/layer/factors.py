"""What a factorized layer holds: the factors of its adapters, and how they are drawn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...maths.compose import Half, Nonlinearity
from ...maths.errors import RankError
from ...maths.parameterizations import Parameterization, get_parameterization
from ...maths.starts.named import Start, fill_start
from ...maths.starts.variances import factor_std, fill_normal, half_variances, identity_start_stds
from ..config import BaseWeight, ComputePath, FedParaConfig
from ..errors import ConfigError
from ..plan import WeightPlan

#: What a container of factors is called.
FACTOR_CONTAINER = re.compile(r"fedpara_w\d+_[xyt]")


def half_containers(half: int) -> tuple[str, str, str]:
    """Containers of the factors X, Y, T of a half; each maps adapter to weight to factor.

    No name ends in a digit: PEFT matches ``modules_to_save`` by the end of a name.
    """
    return (f"fedpara_w{half + 1}_x", f"fedpara_w{half + 1}_y", f"fedpara_w{half + 1}_t")


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of one adapter on one layer."""

    plans: Mapping[str, WeightPlan]
    parameterization: str
    nonlinearity: Nonlinearity
    base_weight: BaseWeight
    rank_dropout: float
    module_dropout: float
    compute_path: ComputePath

    @property
    def replaced(self) -> bool:
        """Whether the layer has no weight but the composed one."""
        return self.base_weight == "replaced"

    @property
    def from_scratch(self) -> bool:
        """Whether there is no pretrained weight: replaced, or drawn from a seed."""
        return self.base_weight != "frozen"

    @property
    def form(self) -> Parameterization:
        """What the parameterization's name stands for."""
        return get_parameterization(self.parameterization)


class FactorHolder(BaseTunerLayer):
    """Part of :class:`~fedpara_peft.tuner.layer.FedParaLayer`: its factors, by adapter."""

    adapter_layer_names: tuple[str, ...] = half_containers(0) + half_containers(1)
    specs: dict[str, AdapterSpec]
    r: dict[str, int]
    alpha: dict[str, float]
    scaling: dict[str, float]

    if TYPE_CHECKING:  # PEFT is not typed; without this all of its methods would be tensors

        def __getattr__(self, name: str) -> Any: ...

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
            base_weight=config.base_weight,
            rank_dropout=config.rank_dropout,
            module_dropout=config.module_dropout,
            compute_path=config.compute_path,
        )
        self.specs[adapter_name] = spec
        # The weights of a recurrent layer may differ in rank under γ; the scale is the layer's.
        self.r[adapter_name] = max(plan.r for plan in plans.values())
        self.alpha[adapter_name] = self.r[adapter_name] if alpha is None else alpha
        self._rank_stabilized[adapter_name] = config.use_rslora and alpha is not None
        self.scaling[adapter_name] = self.own_scale(adapter_name)
        for half in range(spec.form.num_halves):
            self._add_containers(half)
            for position, container in enumerate(half_containers(half)):
                factors = {
                    name: nn.Parameter(torch.empty(factor_shapes(plan)[position]))
                    for name, plan in plans.items()
                    if position < 2 or plan.kernel
                }
                if factors:
                    getattr(self, container)[adapter_name] = nn.ParameterDict(factors)
        self.reset_adapter_parameters(adapter_name, config.init_weights)
        if config.remainder:
            self.hold_remainder(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_adapter_parameters(
        self, adapter_name: str, init_weights: bool | Start = True
    ) -> None:
        """Draw the factors anew from torch's global generator; those of a seed are not drawn so.

        A replaced weight gets the variance documented for its kind; beside a frozen one the
        factors are drawn so that ΔW's first steps are LoRA's (see ``identity_start_stds`` in
        ``maths/starts/variances.py``), or as ``init_weights`` names it.

        Raises:
            ConfigError: the layer cannot start so.
        """
        spec = self.specs[adapter_name]
        for name in spec.plans if spec.base_weight != "seeded" else ():
            if isinstance(init_weights, str):
                self._start_as(init_weights, adapter_name, name)
                continue
            self._draw(adapter_name, name, range(spec.form.num_halves))
            if init_weights and not spec.replaced:
                self._zero(adapter_name, name, spec.form.zero_halves)
        self.note_drawn_local_half(adapter_name)

    def note_drawn_local_half(self, adapter_name: str) -> None:
        """Remember how the personal half was drawn, by a row of each factor."""
        self._drawn_local[adapter_name] = [f.clone() for f in self._local_rows(adapter_name)]

    def keep_local_half(self, adapter_name: str) -> None:
        """Note that a checkpoint without the personal half must not reset it."""
        self._drawn_local.pop(adapter_name, None)

    def has_fresh_local_half(self, adapter_name: str) -> bool:
        """Whether the personal half is as it was drawn: neither trained nor loaded."""
        drawn = self._drawn_local.get(adapter_name)
        return drawn is not None and all(
            now.is_meta or then.is_meta or torch.equal(now, then.to(now))
            for now, then in zip(self._local_rows(adapter_name), drawn, strict=True)
        )

    def reset_local_half(self, adapter_name: str) -> None:
        """Draw the local halves anew so that they are zero: neutral, as W₂ + 1 = 1 is."""
        spec = self.specs[adapter_name]
        for name in spec.plans:
            self._draw(adapter_name, name, spec.form.local_halves)
            self._zero(adapter_name, name, spec.form.local_halves)
        self.note_drawn_local_half(adapter_name)

    def halves(self, adapter_name: str, name: str = "weight") -> tuple[Half, ...]:
        """The factors of one weight, one :class:`Half` per half."""
        spec = self.specs[adapter_name]
        found = []
        for half in range(spec.form.num_halves):
            # Looked up at every step: what a module does around an attribute is felt there.
            x, y, t = (self._modules[container] for container in half_containers(half))
            core = _factor(t[adapter_name], name) if spec.plans[name].kernel else None
            found.append(Half(_factor(x[adapter_name], name), _factor(y[adapter_name], name), core))
        return tuple(found)

    def local_containers(self, adapter_name: str) -> tuple[str, ...]:
        """Containers whose factors stay on the client: pFedPara's W₂."""
        spec = self.specs.get(adapter_name)
        local = () if spec is None else spec.form.local_halves
        return tuple(container for half in local for container in half_containers(half))

    def _add_containers(self, half: int) -> None:
        for container in half_containers(half):
            if container not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, container)
            if container not in self._modules:
                setattr(self, container, nn.ModuleDict())

    def _factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        for container in self.adapter_layer_names:
            for name, factor in getattr(self, container).named_parameters():
                yield f"{container}.{name}", factor

    def _local_rows(self, adapter_name: str) -> list[Tensor]:
        spec = self.specs[adapter_name]
        halves = [
            self.halves(adapter_name, n)[i] for n in spec.plans for i in spec.form.local_halves
        ]
        return [factor.detach()[:1] for half in halves for factor in half.tensors()]

    def _zero(self, adapter_name: str, name: str, which: Iterable[int]) -> None:
        halves = self.halves(adapter_name, name)
        for index in which:
            nn.init.zeros_(halves[index].x)

    def _start_as(self, start: Start, adapter_name: str, name: str) -> None:
        plan = self.specs[adapter_name].plans[name]
        halves = self.halves(adapter_name, name)
        try:
            fill_start(start, halves, lambda: self._as_composed(self._get_base_tensor(name), plan))
        except RankError as error:
            raise ConfigError(str(error)) from None

    def _as_composed(self, base: Tensor, plan: WeightPlan) -> Tensor:
        """A weight of the base layer's layout as the maths has it, ``(M, N)`` or with a kernel."""
        return (base.T if self.transposed else base).reshape(plan.rows, plan.columns, *plan.kernel)

    def _draw(self, adapter_name: str, name: str, which: Iterable[int]) -> None:
        spec = self.specs[adapter_name]
        halves = self.halves(adapter_name, name)
        for index in which:
            stds = _factor_stds(spec, spec.plans[name], index)
            for factor, std in zip(halves[index], stds, strict=True):
                if factor is not None:
                    fill_normal(factor, std)


def _factor_stds(spec: AdapterSpec, plan: WeightPlan, index: int) -> tuple[float, float, float]:
    """Of X, Y and T of a half."""
    kernel = bool(plan.kernel)
    if not spec.replaced:  # pFedPara's local half anew beside a seeded base, too
        fan_in = plan.shape.numel // plan.shape.out_features
        return identity_start_stds(plan.r, fan_in, spec.parameterization, kernel=kernel)[index]
    variances = half_variances(plan.shape.variance, spec.parameterization, spec.nonlinearity)
    std = factor_std(variances[index], plan.r, kernel=kernel, nonlinearity=spec.nonlinearity)
    return std, std, std


def factor_shapes(plan: WeightPlan) -> tuple[tuple[int, ...], ...]:
    """The shapes of X, Y and, for kernels with a core, T of each half."""
    core = ((plan.r, plan.r, *plan.kernel),) if plan.kernel else ()
    return ((plan.rows, plan.r), (plan.columns, plan.r), *core)


def _factor(factors: nn.ParameterDict, name: str) -> Tensor:
    """A factor; of a model that accelerate offloads, from where its hook keeps the values.

    Hooks bring a module's weights back before its forward, which a dictionary of factors has not.
    """
    factor: Tensor = factors[name]
    hook: Any = getattr(factors, "_hf_hook", None) if factor.is_meta else None
    kept = getattr(hook, "weights_map", None)
    return factor if kept is None else kept[name].to(hook.execution_device)
