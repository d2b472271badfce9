"""``FedParaModel``: how PEFT injects, saves, loads and merges FedPara layers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ._peft import (
    DEFAULT_TARGETS,
    DUMMY_TARGET_MODULES,
    AuxiliaryTrainingWrapper,
    find_minimal_names,
    is_excluded,
    is_key_under_prefixes,
    quantization_backend_of,
    resolve_all_linear,
    tuner_key_prefixes,
)
from .config import ALL_SUPPORTED, FedParaConfig
from .conv import Conv
from .embedding import Embedding
from .errors import CheckpointError, ReplacedWeightError, TargetError, UnsupportedLayerError
from .layer import FedParaLayer
from .linear import Linear
from .plan import WeightPlan, alpha_for, plan_layer
from .recurrent import Recurrent
from .scope import local_tensors, saved_name

#: Layer kinds: the classes of base layers and the layer that factorizes them.
LAYER_KINDS: tuple[tuple[tuple[type[nn.Module], ...], type[FedParaLayer]], ...] = (
    ((nn.Linear, Conv1D), Linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), Conv),
    ((nn.Embedding,), Embedding),
    ((nn.LSTM, nn.GRU, nn.RNN), Recurrent),
)

_PEFT_PREFIX = "base_model.model."


def layer_class_for(base_layer: nn.Module) -> type[FedParaLayer] | None:
    """The layer that factorizes a module, None where there is none."""
    # The output projection of MultiheadAttention: its parent reads the weight and never calls it.
    if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if _weight_is_computed(base_layer):
        return None
    for classes, layer_cls in LAYER_KINDS:
        # Transposed convolutions are no subclass of these, quantized linear layers may be.
        if isinstance(base_layer, classes):
            return layer_cls
    backend = quantization_backend_of(base_layer)
    return Linear if backend is not None and backend.layer_type == "linear" else None


class FedParaModel(BaseTuner):
    """A model with FedPara adapters.

    Args:
        model: the model to adapt.
        config: a :class:`FedParaConfig`.
        adapter_name: name of the adapter.

    Raises:
        TargetError: the target names match nothing that can be factorized.
        UnsupportedLayerError: a target name matches a module of another kind. The model is
            untouched then.
    """

    if TYPE_CHECKING:  # PEFT is not typed

        def __getattr__(self, name: str) -> Any: ...

    prefix: str = "fedpara_"
    tuner_layer_cls = FedParaLayer
    target_module_mapping = DEFAULT_TARGETS

    # Before injection: everything that can be refused is refused here, with the model untouched.

    def _prepare_model(self, peft_config: FedParaConfig, model: nn.Module) -> None:
        _resolve_targets(peft_config, model)
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        replaced = peft_config.base_weight == "replaced"
        matched = 0
        factorized = 0
        shared = _shared_parameters(model) if replaced else set()
        for key, module in model.named_modules():
            if not key or not self._is_target(peft_config, model, key):
                continue
            matched += 1
            base_layer = _base_layer(module)
            layer_cls = _supported_class(module)
            if replaced:
                _check_replaceable(layer_cls, base_layer, key, shared)
            factorized += bool(plan_layer(peft_config, key, layer_cls.weights_of(base_layer)))
        if matched and not factorized:
            raise TargetError(
                "no targeted weight would become smaller by factorizing it, so all would stay "
                f"dense (gamma={peft_config.gamma}, r={peft_config.r}): lower r, or set gamma"
            )

    def _is_target(self, config: FedParaConfig, model: nn.Module, key: str) -> bool:
        inside = any(isinstance(parent, BaseTunerLayer) for parent in _ancestors(model, key))
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
        base_layer = _base_layer(target)
        plans = plan_layer(config, current_key, _supported_class(target).weights_of(base_layer))
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
        return _supported_class(target)(target, adapter_name, config, plans, alpha, **kwargs)

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
        whole = dict(state_dict)
        for name in map(saved_name, local_tensors(model)):
            original = name.replace(f".modules_to_save.{adapter_name}.", ".original_module.")
            state_dict.pop(name, None)
            if original != name:  # PEFT insists on an entry: it gets the one before training
                state_dict[name] = whole[original]
        if config.base_weight == "replaced":
            wrapped = _auxiliary_names(model)
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
        _squeeze_cores(model, remapped)
        for name in local_tensors(model):  # a client keeps its head; see _get_adapter_state_dict
            if ".modules_to_save." in name:
                remapped.pop(name, None)
        if config.base_weight == "replaced":
            remapped = cls._remap_rest(model, adapter_name, remapped)
        if config.parameterization == "pfedpara":
            _neutral_local_half(model, adapter_name, remapped)
        return remapped

    @classmethod
    def _remap_rest(
        cls, model: nn.Module, adapter_name: str, state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Bring the entries beside the factors to the model's keys and miss none silently."""
        prefixes = tuner_key_prefixes(model, adapter_name=adapter_name)
        target = model.state_dict()
        local = local_tensors(model)
        renamed = dict(state)
        tied: dict[int, nn.Parameter] = {}
        missing = []
        wrapped = _auxiliary_names(model)
        for key, tensor in target.items():
            if is_key_under_prefixes(key, wrapped):
                continue
            if is_key_under_prefixes(key, prefixes):
                if key not in renamed and key not in local:
                    missing.append(key)
                continue
            saved = cls._remove_adapter_name_from_key(key, adapter_name)
            candidates = [k for k in (key, saved, _PEFT_PREFIX + saved) if k in renamed]
            if candidates:
                value = renamed.pop(candidates[0])
                # Loading with assign=True unties what shares storage, unless it gets one object.
                if tensor.device.type != "meta" and isinstance(
                    parameter := _get_tensor(model, key), nn.Parameter
                ):
                    value = tied.setdefault(
                        id(parameter), nn.Parameter(value, requires_grad=parameter.requires_grad)
                    )
                renamed[key] = value
            elif key not in local:
                missing.append(key)
        if missing:
            raise CheckpointError(
                f"the saved adapter lacks {len(missing)} of the model's tensors, first "
                f"{missing[:3]}: with base_weight='replaced' a checkpoint holds the whole model; "
                "build the model the adapter was trained with"
            )
        return renamed


def _auxiliary_names(model: nn.Module) -> set[str]:
    """Names of the modules that PEFT wrapped to train and save them whole."""
    return {
        saved_name(name)
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }


def _weight_is_computed(module: nn.Module) -> bool:
    """Whether the layer does not simply use its weight (weight norm, position embeddings)."""
    if is_parametrized(module) or hasattr(module, "weight_g"):
        return True
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is not nn.Embedding.forward
        and getattr(module, "embed_scale", None) is None
    )


def _resolve_targets(config: FedParaConfig, model: nn.Module) -> None:
    """Turn the shorthands of ``target_modules`` into names."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_SUPPORTED:
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        shared = _shared_parameters(model)
        names: list[str] = []
        others: list[str] = []
        for name, module in model.named_modules():
            inside = any(isinstance(p, BaseTunerLayer) for p in _ancestors(model, name))
            wanted = (
                bool(name)
                and not inside
                and layer_class_for(_base_layer(module)) is not None
                and module is not head
                and not any(id(p) in shared for p in _base_layer(module).parameters())
            )
            (names if wanted else others).append(name)
        if not names:
            raise TargetError(
                "target_modules='all-supported' found no layer that can be factorized: the model "
                "has no Linear, Conv, Embedding or recurrent layer"
            )
        config.target_modules = find_minimal_names(names, [n for n in others if n])
    else:
        resolve_all_linear(config, model)


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _supported_class(target: nn.Module) -> type[FedParaLayer]:
    base_layer = _base_layer(target)
    layer_cls = layer_class_for(base_layer)
    if layer_cls is not None:
        return layer_cls
    kinds = ", ".join(cls.__name__ for classes, _ in LAYER_KINDS for cls in classes)
    if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        reason = "its parent MultiheadAttention reads the weight without calling the layer"
    elif isinstance(base_layer, nn.modules.conv._ConvTransposeNd):
        reason = "transposed convolutions are not factorized"
    elif _weight_is_computed(base_layer):
        reason = "it does not use its weight as it is (a parametrization, or its own forward)"
    else:
        reason = "FedPara has no form for it"
    raise UnsupportedLayerError(
        f"Target module {base_layer} is not supported: {reason}. Name {kinds} or quantized linear "
        "layers in target_modules, or put this one into exclude_modules."
    )


def _check_replaceable(
    layer_cls: type[FedParaLayer], base_layer: nn.Module, key: str, shared: set[int]
) -> None:
    if quantization_backend_of(base_layer, get_apply_tensor_subclass=dict) is not None:
        raise UnsupportedLayerError(
            f"{key} has a quantized weight, which cannot be replaced: use base_weight='frozen'"
        )
    if any(id(p) in shared for p in base_layer.parameters(recurse=False)):
        raise TargetError(
            f"{key} shares its weight with another module, which would be left without one: put "
            "it into exclude_modules, or untie the weights before"
        )
    layer_cls.check_replaceable(base_layer, key)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold."""
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, number in count.items() if number > 1}


def _ancestors(model: nn.Module, key: str) -> list[nn.Module]:
    """The modules around the module of this name, the model itself first."""
    parts = key.split(".")[:-1]
    modules = [model]
    for part in parts:
        modules.append(getattr(modules[-1], part))
    return modules if key else []


def _get_tensor(model: nn.Module, key: str) -> Tensor:
    module, _, name = key.rpartition(".")
    return getattr(model.get_submodule(module), name)


def _squeeze_cores(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Bring cores of Conv1d layers that were converted from LoHa, which are k x 1, to shape k."""
    for name, parameter in model.named_parameters():
        if name in state and state[name].shape == (*parameter.shape, 1):
            state[name] = state[name].squeeze(-1)


def _neutral_local_half(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Where a checkpoint holds only the global half, add the local one.

    A personal half that has been trained or loaded stays; a freshly drawn one becomes neutral
    (W₂ = 0).
    """
    for prefix, module in model.named_modules():
        if not isinstance(module, FedParaLayer) or adapter_name not in module.specs:
            continue
        names = {
            f"{prefix}.{container}.{adapter_name}.{weight}": (container, weight)
            for container in module.local_containers(adapter_name)
            if adapter_name in getattr(module, container)
            for weight in getattr(module, container)[adapter_name]
        }
        if not names or any(name in state for name in names):
            continue
        if not module.has_fresh_local_half(adapter_name):
            for name, (container, weight) in names.items():
                state[name] = getattr(module, container)[adapter_name][weight].data
            continue
        factors = {
            name: getattr(module, container)[adapter_name][weight]
            for name, (container, weight) in names.items()
        }
        if any(factor.is_meta for factor in factors.values()):
            for name, (container, weight) in names.items():
                parameters = getattr(module, container)[adapter_name]
                parameters[weight] = nn.Parameter(
                    torch.empty_like(factors[name], device="cpu"),
                    requires_grad=factors[name].requires_grad,
                )
        module.reset_local_half(adapter_name)
        for name, (container, weight) in names.items():
            state[name] = getattr(module, container)[adapter_name][weight].data
