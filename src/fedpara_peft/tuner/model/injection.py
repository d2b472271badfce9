"""``FedParaModel``: how PEFT injects, saves, loads and merges FedPara layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from .._peft import (
    DEFAULT_TARGETS,
    DUMMY_TARGET_MODULES,
    AuxiliaryTrainingWrapper,
    is_excluded,
)
from ..config import FedParaConfig
from ..errors import (
    ConfigError,
    ReplacedWeightError,
    TargetError,
    UnsupportedMethodError,
)
from ..layer import FedParaLayer, factorized_layers, factorized_weights, half_containers
from ..layer.mixed_batch import each_sample_its_adapter
from ..plan import WeightPlan, alpha_for, plan_layer
from .saving import SavedModel
from .targets import (
    ancestors,
    base_layer_of,
    check_replaceable,
    layer_class_for,
    resolve_targets,
    shared_parameters,
    supported_class,
    untie,
    warn_of_unmatched_names,
)

logger = logging.getLogger(__name__)

#: Methods of PEFT's LoRA that nobody else has, and what to do instead.
_INSTEAD_OF = {
    "add_weighted_adapter": "activate several adapters with base_model.set_adapter([…]), whose sum "
    "is applied, or convert each with save_as_lora and combine those",
    "subtract_mutated_init": "a FedPara adapter leaves the base weights as they are",
}


class FedParaModel(SavedModel):
    """A model with FedPara adapters.

    Args:
        model: the model to adapt.
        config: a :class:`FedParaConfig`.
        adapter_name: name of the adapter.

    Attributes:
        training_facts: what its model cards tell of its training, as text by name.
        training_metrics: of the newest evaluation, for the same cards.

    Raises:
        ConfigError: ``compute_path="khatri_rao"`` over a grouped convolution.
        TargetError: the target names match nothing that can be factorized.
        UnsupportedLayerError: a target name matches a module of another kind. The model is
            untouched then.
    """

    prefix: str = "fedpara_"
    tuner_layer_cls = FedParaLayer
    target_module_mapping = DEFAULT_TARGETS
    training_facts: Mapping[str, str] | None = None
    training_metrics: Mapping[str, float] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # modules_to_save whose adapters are off: what was active, what did not train
        self._frozen_in_heads: dict[AuxiliaryTrainingWrapper, tuple[Any, list[nn.Parameter]]] = {}

    def __getattr__(self, name: str) -> Any:
        """As PEFT's: the wrapped model's attributes, but for the methods that only LoRA has."""
        if name in _INSTEAD_OF:
            raise UnsupportedMethodError(
                f"FedPara has no {name}, which is LoRA's alone in PEFT: {_INSTEAD_OF[name]}"
            )
        return super().__getattr__(name)

    # Before injection: everything that can be refused is refused here, with the model untouched.

    def _prepare_model(self, peft_config: FedParaConfig, model: nn.Module) -> None:
        warn_of_unmatched_names(peft_config, model)
        _refuse_to_save_factors(peft_config)
        resolve_targets(peft_config, model)
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        matched = 0
        factorized = 0
        shared = shared_parameters(model) if peft_config.from_scratch else set()
        for key, module in model.named_modules():
            if not key or not self._is_target(peft_config, model, key):
                continue
            matched += 1
            base_layer = base_layer_of(module)
            layer_cls = supported_class(module, key)
            if peft_config.from_scratch:
                check_replaceable(layer_cls, base_layer, key, shared)
            layer_cls.check_compute_path(base_layer, key, peft_config.compute_path)
            alpha_for(peft_config, key)
            factorized += bool(plan_layer(peft_config, key, layer_cls.weights_of(base_layer)))
        if matched and not factorized:
            raise TargetError(
                "no targeted weight would become smaller by factorizing it, so all would stay "
                f"dense (gamma={peft_config.gamma}, r={peft_config.r}): lower r, or set gamma"
            )

    def _is_target(self, config: FedParaConfig, model: nn.Module, key: str) -> bool:
        inside = any(isinstance(parent, BaseTunerLayer) for parent in ancestors(model, key))
        match = self._check_target_module_exists(config, key)
        return not inside and bool(match) and not is_excluded(match)

    def _check_new_adapter_config(self, config: FedParaConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1 and any(
            getattr(c, "from_scratch", False) for c in self.peft_config.values()
        ):
            raise ReplacedWeightError(
                "a model trained from scratch has one adapter: there is no pretrained W₀ that two "
                "could share; use base_weight='frozen', or merge_and_unload() before adding another"
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Put the adapter into the model; see PEFT's ``BaseTuner.inject_adapter``."""
        try:
            super().inject_adapter(model, adapter_name, **kwargs)
        except NoMatchingPeftModuleError as error:
            if isinstance(error, TargetError):
                raise
            names = [n for n, m in model.named_modules() if layer_class_for(m) is not None]
            hint = f" Layers that can be factorized: {', '.join(names[:12]) or 'none'}"
            hint += ", …" if len(names) > 12 else "."
            raise TargetError(f"{error}{hint}") from None

    def _create_and_replace(
        self,
        config: FedParaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        # PeftMixedModel calls this with itself as `self`: nothing of ours may be used on it.
        base_layer, layer_cls = base_layer_of(target), supported_class(target)
        layer_cls.check_compute_path(base_layer, current_key, config.compute_path)
        plans = plan_layer(config, current_key, layer_cls.weights_of(base_layer))
        if not plans:
            return  # stays dense; fedpara_summary() shows it
        alpha = alpha_for(config, current_key)
        if isinstance(target, FedParaLayer):
            target.update_layer(adapter_name, config=config, plans=plans, alpha=alpha)
            return
        new_module = FedParaModel._create_new_module(
            config, adapter_name, target, plans=plans, alpha=alpha, **get_quantization_kwargs(self)
        )
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        config: FedParaConfig,
        adapter_name: str,
        target: nn.Module,
        *,
        plans: dict[str, WeightPlan],
        alpha: float | None,
        **kwargs: Any,
    ) -> FedParaLayer:
        return supported_class(target)(target, adapter_name, config, plans, alpha, **kwargs)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        recurrent = isinstance(new_module, nn.RNNBase)  # PEFT would hand it a `weight`
        if recurrent or any(p.is_meta for p in new_module.parameters()):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        configs = [self.peft_config[name] for name in self.active_adapters]
        if any(config.from_scratch for config in configs):
            if any(config.inference_mode for config in configs):
                model.requires_grad_(False)
            return
        # PEFT looks for a tensor named `bias`, which recurrent layers have as a bool.
        wanted = [config.bias for config in configs]
        try:
            for config in configs:
                config.bias = "all" if config.bias == "all" else "none"
            super()._mark_only_adapters_as_trainable(model)
        finally:
            for config, bias in zip(configs, wanted, strict=True):
                config.bias = bias
        if any(bias != "none" for bias in wanted):
            for _, layer in factorized_layers(model):
                for name in layer.bias_names():
                    getattr(layer.get_base_layer(), name).requires_grad_(True)

    def _post_injection_hook(
        self, model: nn.Module, config: FedParaConfig, adapter_name: str
    ) -> None:
        for key, layer in factorized_layers(model, adapter_name) if config.from_scratch else ():
            if layer.replaced:
                layer.free_base_weights()
            else:
                layer.draw_from_seed(adapter_name, key, config)
        if not (config.from_scratch or config.inference_mode):
            _warn_of_moving_statistics(model)

    # In use.

    untie = staticmethod(untie)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What ``PeftModel`` opens around ``forward`` and ``generate``: see ``mixed_batch.py``."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = dict(factorized_layers(self.model))
        settings = kwargs.get("generation_config")  # generate() repeats its samples
        repeats = [
            kwargs.get(option) or getattr(settings, option, None) or 1
            for option in ("num_beams", "num_return_sequences")
        ]
        with each_sample_its_adapter(self.model, layers, names, max(repeats)):
            yield

    def disable_adapter_layers(self) -> None:
        """Turn the adapters off; see PEFT's ``BaseTuner.disable_adapter_layers``."""
        self._note_frozen_heads()
        super().disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        """Turn the adapters on; what did not train before is not trained by that.

        PEFT would train the ``modules_to_save`` of an adapter that was loaded for inference. (A
        factorized layer sees to itself.)
        """
        self._note_frozen_heads()
        super().enable_adapter_layers()
        for head, (active, frozen) in self._frozen_in_heads.items():
            if active == head.active_adapters:
                for parameter in frozen:
                    parameter.requires_grad_(False)
        self._frozen_in_heads.clear()

    def _note_frozen_heads(self) -> None:
        for head in self._heads():
            if not head.disable_adapters:
                frozen = [p for p in head.parameters() if not p.requires_grad]
                self._frozen_in_heads[head] = (copy.copy(head.active_adapters), frozen)

    def _heads(self) -> list[AuxiliaryTrainingWrapper]:
        return [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Write composed weights into the base layers; see PEFT's ``BaseTuner.merge_adapter``.

        A base weight that another module shares (a tied head) is copied first: the adapter was not
        on that module before either.
        """
        untie(self.model)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            untie(self.model)
        weights = [w for w in factorized_weights(self.model) if w.spec.from_scratch]
        model: nn.Module = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        for found in weights:  # what trained as factors is an ordinary weight now, and trains
            getattr(found.layer.get_base_layer(), found.weight).requires_grad_(True)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; one trained from scratch cannot be removed.

        Raises:
            ReplacedWeightError: there are no pretrained weights.
        """
        self._refuse_from_scratch("delete_adapter")
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """Remove the adapters; weights trained from scratch are nothing without them.

        Raises:
            ReplacedWeightError: there are no pretrained weights.
        """
        self._refuse_from_scratch("unload")
        return super().unload()

    def _refuse_from_scratch(self, what: str) -> None:
        for config in self.peft_config.values():
            if config.from_scratch:
                raise ReplacedWeightError(
                    f"{what} is not possible: base_weight={config.base_weight!r}, the factors are "
                    "the weight; use merge_and_unload()"
                )


def _refuse_to_save_factors(config: FedParaConfig) -> None:
    """PEFT takes ``modules_to_save`` by the end of a name, whole parts or not."""
    own = [c for half in range(config.form.num_halves) for c in half_containers(half)]
    containers = dict.fromkeys([*FedParaLayer.adapter_layer_names, *own])
    for name in config.modules_to_save or ():
        caught = [c for c in containers if c.endswith(name)]
        if caught:
            raise ConfigError(
                f"modules_to_save has {name!r}, and PEFT would take the factors {caught[0]!r} for "
                f"it, whose name ends so: give more of the dotted name, as in 'parent.{name}'"
            )


def _warn_of_moving_statistics(model: nn.Module) -> None:
    """Say that batch norms move under a frozen base, and that the adapter does not hold them."""
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and not any(isinstance(m, AuxiliaryTrainingWrapper) for m in ancestors(model, name))
    ]
    if moving:
        logger.warning(
            "%d batch norms, first %s, go on moving their running statistics in training, though "
            "the base is frozen, and the adapter is saved without them: keep them in eval() while "
            "training, or put them into modules_to_save",
            len(moving), moving[0],
        )  # fmt: skip
