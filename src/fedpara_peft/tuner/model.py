"""``FedParaModel``: how PEFT injects, saves, loads and merges FedPara layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from ._peft import (
    DEFAULT_TARGETS,
    DUMMY_TARGET_MODULES,
    AuxiliaryTrainingWrapper,
    is_excluded,
    is_key_under_prefixes,
)
from .checkpoint import (
    auxiliary_names,
    fill_local_half,
    give_memory,
    remap_rest,
    saved_modules,
    squeeze_cores,
)
from .config import FedParaConfig
from .errors import (
    CheckpointError,
    ConfigError,
    ReplacedWeightError,
    TargetError,
    UnsupportedMethodError,
)
from .layer import FedParaLayer
from .mixed_batch import each_sample_its_adapter
from .names import saved_name
from .plan import WeightPlan, alpha_for, plan_layer
from .scope import local_tensors
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


class FedParaModel(BaseTuner):
    """A model with FedPara adapters.

    Args:
        model: the model to adapt.
        config: a :class:`FedParaConfig`.
        adapter_name: name of the adapter.

    Attributes:
        training_facts: what its model cards tell of its training, as text by name.

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
        replaced = peft_config.base_weight == "replaced"
        matched = 0
        factorized = 0
        shared = shared_parameters(model) if replaced else set()
        for key, module in model.named_modules():
            if not key or not self._is_target(peft_config, model, key):
                continue
            matched += 1
            base_layer = base_layer_of(module)
            layer_cls = supported_class(module, key)
            if replaced:
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
            getattr(c, "base_weight", "frozen") == "replaced" for c in self.peft_config.values()
        ):
            raise ReplacedWeightError(
                "base_weight='replaced' allows one adapter: there is no W₀ that two could share; "
                "use base_weight='frozen', or merge_and_unload() before adding another"
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
        if any(config.base_weight == "replaced" for config in configs):
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
            for layer in model.modules():
                if isinstance(layer, FedParaLayer):
                    for name in layer.bias_names():
                        getattr(layer.get_base_layer(), name).requires_grad_(True)

    def _post_injection_hook(
        self, model: nn.Module, config: FedParaConfig, adapter_name: str
    ) -> None:
        if config.base_weight == "replaced":
            for module in model.modules():
                if isinstance(module, FedParaLayer):
                    module.free_base_weights()
        elif not config.inference_mode:
            _warn_of_moving_statistics(model)

    # In use.

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What ``PeftModel`` opens around ``forward`` and ``generate``: see ``mixed_batch.py``."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, FedParaLayer)}
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
        model: nn.Module = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; a replaced weight cannot be removed.

        Raises:
            ReplacedWeightError: the base weights have been replaced.
        """
        self._refuse_if_replaced("delete_adapter", "the factors are the weight")
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """Remove the adapters; a replaced weight is nothing without them.

        Raises:
            ReplacedWeightError: the base weights have been replaced.
        """
        self._refuse_if_replaced("unload", "the factors are the weight")
        return super().unload()

    def _refuse_if_replaced(self, what: str, why: str) -> None:
        if any(config.base_weight == "replaced" for config in self.peft_config.values()):
            raise ReplacedWeightError(
                f"{what} is not possible: base_weight='replaced', {why}; use merge_and_unload()"
            )

    # Saving: only what is communicated.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: FedParaConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT goes on to pick embedding tensors from the same dictionary after this hook, so what
        # must not leave the client is taken out of the dictionary itself.
        _refuse_lost_layers(model, adapter_name, unwanted_adapter_names)
        whole = dict(state_dict)
        originals = saved_modules(model, adapter_name)
        for name in map(saved_name, local_tensors(model)):
            state_dict.pop(name, None)
            if name in originals:  # PEFT insists on an entry: it gets the one before training
                state_dict[name] = whole[originals[name]]
        if config.base_weight == "replaced":
            wrapped = auxiliary_names(model)
            return {k: v for k, v in state_dict.items() if not is_key_under_prefixes(k, wrapped)}
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: FedParaConfig
    ) -> dict[str, Tensor]:
        found = super()._get_learnable_bias_state_dict(model, state_dict, config)
        if config.bias != "none":
            for prefix, module in model.named_modules():
                if isinstance(module, FedParaLayer):
                    for name in module.bias_names():
                        key = f"{saved_name(prefix)}.base_layer.{name}"
                        if key in state_dict:  # a local module's is not
                            found[key] = state_dict[key]
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Only behind a container of factors: the model may have modules of the adapter's name.
        parts = key.split(".")
        for i in range(len(parts) - 1, 0, -1):
            if parts[i] == adapter_name and parts[i - 1] in FedParaLayer.adapter_layer_names:
                return ".".join(parts[:i] + parts[i + 1 :])
        return key

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Replaced factors are the weight: they keep the dtype that the model was built in.
        if self.peft_config[adapter_name].base_weight != "replaced":
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    # Loading.

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: FedParaConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        squeeze_cores(model, remapped)
        # A client keeps its head; see _get_adapter_state_dict.
        for name in saved_modules(model, adapter_name).keys() & local_tensors(model):
            remapped.pop(name, None)
        if config.base_weight == "replaced":
            remove = cls._remove_adapter_name_from_key
            remapped = remap_rest(model, adapter_name, remapped, remove)
        if config.parameterization == "pfedpara":
            fill_local_half(model, adapter_name, remapped)
        give_memory(model, remapped)
        return remapped


def _refuse_to_save_factors(config: FedParaConfig) -> None:
    """PEFT takes ``modules_to_save`` by the end of a name, whole parts or not."""
    for name in config.modules_to_save or ():
        caught = [c for c in FedParaLayer.adapter_layer_names if c.endswith(name)]
        if caught:
            raise ConfigError(
                f"modules_to_save has {name!r}, and PEFT would take the factors {caught[0]!r} for "
                f"it, whose name ends so: give more of the dotted name, as in 'parent.{name}'"
            )


def _refuse_lost_layers(model: nn.Module, adapter_name: str, others: list[str]) -> None:
    """PEFT takes a module named as another adapter for a part of that one, and leaves it out."""
    for name, module in model.named_modules():
        if isinstance(module, FedParaLayer) and adapter_name in module.specs:
            taken = set(others).intersection(name.split("."))
            if taken:
                raise CheckpointError(
                    f"PEFT would leave {name} out of adapter {adapter_name!r}, because another "
                    f"adapter is called {min(taken)!r} as a module is: give that one another name"
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
            len(moving),
            moving[0],
        )
