"""What ``target_modules`` means: layer kinds, shorthands, and what cannot be factorized."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from .._peft import (
    DEFAULT_TARGETS,
    DUMMY_TARGET_MODULES,
    find_minimal_names,
    quantization_backend_of,
    resolve_all_linear,
)
from ..config import ALL_SUPPORTED, HEAD_TASKS, FedParaConfig
from ..errors import TargetError, UnsupportedLayerError
from ..kinds import LAYER_KINDS, kind_for, kind_of
from ..layer import FedParaLayer, factorized_layers
from ..names import base_names


def layer_class_for(base_layer: nn.Module) -> type[FedParaLayer] | None:
    """The layer that factorizes a module, None where there is none."""
    return None if _reason_against(base_layer) is not None else kind_for(base_layer)


def _reason_against(module: nn.Module) -> str | None:
    """Why a layer cannot be factorized, whatever its kind; None if nothing speaks against it."""
    kind = kind_of(module)
    use = None
    if is_parametrized(module):
        use = (
            "a parametrization computes it; remove_parametrizations of torch.nn.utils.parametrize "
            "ends that"
        )
    elif any(is_lazy(p) for p in module.parameters(recurse=False)):
        use = "it is lazy and has none yet; run a batch through the model first"
    elif kind is not None and (computed := _computed(module, "weight")):
        use = _by_hook(module, computed[0])
    if use is not None:
        return f"it does not use its weight as it is ({use})"
    if kind is not None and 0 in kind.features_of(module):
        return "its weight has no entries"
    return None if kind is None else kind.unsupported(module)


def _by_hook(module: nn.Module, name: str) -> str:
    hooks = sorted({type(hook).__name__ for hook in module._forward_pre_hooks.values()})
    return (
        f"{' and '.join(hooks) or 'its class'} computes {name} anew before every forward pass; "
        "remove_spectral_norm, remove_weight_norm or prune.remove of torch.nn.utils make it a "
        "parameter again"
    )


def _computed(module: nn.Module, kind: Literal["weight", "bias"]) -> list[str]:
    """Weights or biases that are attributes only, as weight norm, spectral norm and prune have it.

    Offloaded and quantized layers, and those whose weight has been replaced, have an entry.
    """
    held = {*module._parameters, *module._buffers}
    names = [n for n in getattr(module, "_flat_weights_names", [kind]) if n.startswith(kind)]
    missing = [name for name in names if name not in held and hasattr(module, name)]
    # Another library's quantized layer keeps its weight as it likes.
    return missing if not missing or quantization_backend_of(module) is None else []


def resolve_targets(config: FedParaConfig, model: nn.Module) -> None:
    """Turn the shorthands of ``target_modules`` into names."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_SUPPORTED:
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        shared = shared_parameters(model)
        names: list[str] = []
        others: list[str] = []
        for name, module in model.named_modules():
            inside = any(isinstance(p, BaseTunerLayer) for p in ancestors(model, name))
            wanted = (
                bool(name)
                and not inside
                and layer_class_for(base_layer_of(module)) is not None
                and module is not head
                and not any(id(p) in shared for p in base_layer_of(module).parameters())
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


def warn_of_unmatched_names(config: FedParaConfig, model: nn.Module) -> None:
    """Say once which listed names match no module; that none at all does is refused later."""
    plain = [name for name in dict.fromkeys(base_names(model).values()) if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save", "local_modules"):
        listed = getattr(config, field)
        if not listed or isinstance(listed, str) or listed == DUMMY_TARGET_MODULES:
            continue
        # PEFT takes modules_to_save by the end of a name, whole parts or not.
        ends = "" if field == "modules_to_save" else "."
        unmatched = [
            one
            for one in sorted(set(listed) - _from_peft(config, model, field))
            if not any(name == one or name.endswith(f"{ends}{one}") for name in plain)
        ]
        if unmatched and (field == "modules_to_save" or len(unmatched) < len(listed)):
            warnings.warn(
                f"{field} has names that match no module: {', '.join(map(repr, unmatched))}",
                stacklevel=2,
            )


def _from_peft(config: FedParaConfig, model: nn.Module, field: str) -> set[str]:
    """Names that PEFT fills in for kinds of models or tasks, whether this model has them or not."""
    if field == "target_modules":
        kind = getattr(getattr(model, "config", None), "model_type", None)
        defaults = set(DEFAULT_TARGETS.get(str(kind), ()))
        return defaults if defaults == set(config.target_modules or ()) else set()
    if field == "modules_to_save" and config.task_type in HEAD_TASKS:
        return {"classifier", "score", "qa_outputs"}
    return set()


def base_layer_of(module: nn.Module) -> nn.Module:
    """The plain layer inside tuner layers, the module itself where there are none."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def supported_class(target: nn.Module, key: str = "") -> type[FedParaLayer]:
    """The layer that factorizes a target; raises UnsupportedLayerError where there is none.

    Args:
        target: the module.
        key: its name, for the error: a module's own text may fill a screen.
    """
    base_layer = base_layer_of(target)
    layer_cls = layer_class_for(base_layer)
    if layer_cls is not None:
        return layer_cls
    kinds = ", ".join(base.__name__ for kind in LAYER_KINDS for base in kind.base_classes)
    reason = _reason_against(base_layer) or "FedPara has no form for it"
    if isinstance(base_layer, nn.modules.conv._ConvTransposeNd):
        reason = "transposed convolutions are not factorized"
    shown = f"{key} ({type(base_layer).__name__})" if key else type(base_layer).__name__
    raise UnsupportedLayerError(
        f"Target module {shown} is not supported: {reason}. Name {kinds} or quantized linear "
        "layers in target_modules, or put this one into exclude_modules."
    )


def check_replaceable(
    layer_cls: type[FedParaLayer], base_layer: nn.Module, key: str, shared: set[int]
) -> None:
    """Raise a typed error unless this target can train without its pretrained weight."""
    if quantization_backend_of(base_layer, get_apply_tensor_subclass=dict) is not None:
        raise UnsupportedLayerError(
            f"{key} has a quantized weight, which cannot be replaced: use base_weight='frozen'"
        )
    if any(id(p) in shared for p in base_layer.parameters(recurse=False)):
        raise TargetError(
            f"{key} shares its weight with another module, which would be left without one: put "
            "it into exclude_modules, or untie the weights before"
        )
    if computed := _computed(base_layer, "bias"):
        raise UnsupportedLayerError(
            f"{key} cannot have its weight replaced: {_by_hook(base_layer, computed[0])}; or put "
            "it into exclude_modules"
        )
    layer_cls.check_replaceable(base_layer, key)


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold."""
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, number in count.items() if number > 1}


def untie(model: nn.Module) -> None:
    """Give every factorized layer a base weight of its own, where another module shares it."""
    shared = shared_parameters(model)
    modules = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for _, layer in factorized_layers(model):
        if layer.quantization_backend is None:
            base_layer = layer.get_base_layer()
            stands_elsewhere = modules[id(base_layer)] > modules[id(layer)]
            if stands_elsewhere and layer.base_layer is base_layer:
                layer.base_layer = base_layer = _copied(base_layer)
            for name in {name for spec in layer.specs.values() for name in spec.plans}:
                weight = getattr(base_layer, name)
                if id(weight) in shared:
                    own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                    setattr(base_layer, name, own)


def _copied(module: nn.Module) -> nn.Module:
    """A module with the same tensors, each of which can be exchanged."""
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    if isinstance(module, nn.RNNBase):
        vars(own)["_flat_weights"] = list(module._flat_weights)
    return own


def ancestors(model: nn.Module, key: str) -> list[nn.Module]:
    """The modules around the module of this name, the model itself first."""
    parts = key.split(".")[:-1]
    modules = [model]
    for part in parts:
        modules.append(getattr(modules[-1], part))
    return modules if key else []
