"""What ``target_modules`` means: layer kinds, shorthands, and what cannot be factorized."""

from __future__ import annotations

from collections import Counter

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ._peft import find_minimal_names, quantization_backend_of, resolve_all_linear
from .config import ALL_SUPPORTED, FedParaConfig
from .conv import Conv
from .embedding import Embedding
from .errors import TargetError, UnsupportedLayerError
from .layer import FedParaLayer
from .linear import Linear
from .recurrent import Recurrent

#: Layer kinds: the classes of base layers and the layer that factorizes them.
LAYER_KINDS: tuple[tuple[tuple[type[nn.Module], ...], type[FedParaLayer]], ...] = (
    ((nn.Linear, Conv1D), Linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), Conv),
    ((nn.Embedding,), Embedding),
    ((nn.LSTM, nn.GRU, nn.RNN), Recurrent),
)


def layer_class_for(base_layer: nn.Module) -> type[FedParaLayer] | None:
    """The layer that factorizes a module, None where there is none."""
    # The output projection of MultiheadAttention: its parent reads the weight and never calls it.
    if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if _weight_is_computed(base_layer) or _rewrites_its_weight(base_layer):
        return None
    for classes, layer_cls in LAYER_KINDS:
        # Transposed convolutions are no subclass of these, quantized linear layers may be.
        if isinstance(base_layer, classes):
            return layer_cls
    backend = quantization_backend_of(base_layer)
    return Linear if backend is not None and backend.layer_type == "linear" else None


def _weight_is_computed(module: nn.Module) -> bool:
    """Whether the layer does not simply use its weight (weight norm, position embeddings)."""
    if is_parametrized(module) or hasattr(module, "weight_g"):
        return True
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is not nn.Embedding.forward
        and getattr(module, "embed_scale", None) is None
    )


def _rewrites_its_weight(module: nn.Module) -> bool:
    """Whether rows of a table are renormalized in place: of W₀ alone, where W₀ + ΔW was meant."""
    return isinstance(module, nn.Embedding) and module.max_norm is not None


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
    kinds = ", ".join(cls.__name__ for classes, _ in LAYER_KINDS for cls in classes)
    if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        reason = "its parent MultiheadAttention reads the weight without calling the layer"
    elif isinstance(base_layer, nn.modules.conv._ConvTransposeNd):
        reason = "transposed convolutions are not factorized"
    elif _weight_is_computed(base_layer):
        reason = "it does not use its weight as it is (a parametrization, or its own forward)"
    elif _rewrites_its_weight(base_layer):
        reason = (
            f"it has max_norm={base_layer.max_norm}, which rewrites rows of the table; build the "
            "embedding without max_norm"
        )
    else:
        reason = "FedPara has no form for it"
    shown = f"{key} ({type(base_layer).__name__})" if key else type(base_layer).__name__
    raise UnsupportedLayerError(
        f"Target module {shown} is not supported: {reason}. Name {kinds} or quantized linear "
        "layers in target_modules, or put this one into exclude_modules."
    )


def check_replaceable(
    layer_cls: type[FedParaLayer], base_layer: nn.Module, key: str, shared: set[int]
) -> None:
    """Raise a typed error unless this target can train with its weight replaced."""
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


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold."""
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, number in count.items() if number > 1}


def untie(model: nn.Module) -> None:
    """Give every factorized layer a base weight of its own, where another module shares it."""
    shared = shared_parameters(model)
    for module in model.modules():
        if isinstance(module, FedParaLayer) and module.quantization_backend is None:
            base_layer = module.get_base_layer()
            for name in {name for spec in module.specs.values() for name in spec.plans}:
                weight = getattr(base_layer, name)
                if id(weight) in shared:
                    own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                    setattr(base_layer, name, own)


def ancestors(model: nn.Module, key: str) -> list[nn.Module]:
    """The modules around the module of this name, the model itself first."""
    parts = key.split(".")[:-1]
    modules = [model]
    for part in parts:
        modules.append(getattr(modules[-1], part))
    return modules if key else []
