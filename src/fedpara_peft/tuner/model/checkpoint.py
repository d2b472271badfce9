"""Bringing a saved state to a model's keys: all beside the factors, missing local halves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .._peft import (
    WRAPPER_PREFIX,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    is_key_under_prefixes,
    tuner_key_prefixes,
)
from ..errors import CheckpointError
from ..layer import factorized_layers, factorized_weights
from ..names import saved_name
from ..scope import local_tensors


def remap_rest(
    model: nn.Module,
    adapter_name: str,
    state: dict[str, Tensor],
    remove_adapter_name: Callable[[str, str], str],
) -> dict[str, Tensor]:
    """Bring the entries beside the factors to the model's keys and miss none silently."""
    prefixes = tuner_key_prefixes(model, adapter_name=adapter_name)
    target = model.state_dict()
    local = local_tensors(model)
    renamed = dict(state)
    tied: dict[int, nn.Parameter] = {}
    missing = []
    elsewhere = auxiliary_names(model) | base_weight_names(model, adapter_name)
    for key in target:
        if is_key_under_prefixes(key, elsewhere):
            continue
        if is_key_under_prefixes(key, prefixes):
            if key not in renamed and key not in local:
                missing.append(key)
            continue
        saved = remove_adapter_name(key, adapter_name)
        candidates = [k for k in (key, saved, WRAPPER_PREFIX + saved) if k in renamed]
        if candidates:
            value = renamed.pop(candidates[0])
            # Loading with assign=True unties what shares storage, unless it gets one object.
            if isinstance(parameter := _get_tensor(model, key), nn.Parameter):
                value = tied.setdefault(
                    id(parameter), nn.Parameter(value, requires_grad=parameter.requires_grad)
                )
            renamed[key] = value
        elif key not in local:
            missing.append(key)
    empty = [n for n, b in model.named_buffers() if b.is_meta and saved_name(n) not in target]
    if empty:
        raise CheckpointError(
            f"{empty[0]} is on the meta device and in no checkpoint, because it is not persistent: "
            "build the model with its buffers, as accelerate's init_empty_weights() does"
        )
    if missing:
        raise CheckpointError(
            f"the saved adapter lacks {len(missing)} of the model's tensors, first "
            f"{missing[:3]}: trained from scratch, a checkpoint holds the whole model; build the "
            "model the adapter was trained with"
        )
    return renamed


def auxiliary_names(model: nn.Module) -> set[str]:
    """Names of the modules that PEFT wrapped to train and save them whole."""
    return {
        saved_name(name)
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }


def base_weight_names(model: nn.Module, adapter_name: str) -> set[str]:
    """Names of an adapter's base weights, merged or not: nothing saves or sends them."""
    return {saved_name(found.base_name) for found in factorized_weights(model, adapter_name)}


def saved_modules(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Tensors of the modules an adapter saves whole, and the same ones before training."""
    originals = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key in module.modules_to_save[adapter_name].state_dict():
                own = f"{saved_name(name)}.modules_to_save.{adapter_name}.{key}"
                originals[own] = f"{saved_name(name)}.original_module.{key}"
    return originals


def give_memory(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give tensors on the ``meta`` device that will be loaded memory, where their values are.

    Without it torch would take the values and keep none of them.
    """
    fresh: dict[int, tuple[Tensor, Tensor]] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    for prefix, module in modules:
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            key = f"{saved_name(prefix)}.{name}".removeprefix(".")
            if tensor is not None and tensor.is_meta and key in state:
                new = torch.empty_like(tensor, device=state[key].device)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                fresh.setdefault(id(tensor), (tensor, new))
    for _, module in modules:  # under all of its names
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if id(tensor) in fresh:
                setattr(module, name, fresh[id(tensor)][1])


def _get_tensor(model: nn.Module, key: str) -> Tensor:
    module, _, name = key.rpartition(".")
    return getattr(model.get_submodule(module), name)


def squeeze_cores(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Bring cores of Conv1d layers that were converted from LoHa, which are k x 1, to shape k."""
    for name, parameter in model.named_parameters():
        if name in state and state[name].shape == (*parameter.shape, 1):
            state[name] = state[name].squeeze(-1)


def fill_local_half(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Where a checkpoint holds only the global half, add the local one.

    A personal half that has been trained or loaded stays; a freshly drawn one becomes neutral
    (W₂ = 0).
    """
    for prefix, layer in factorized_layers(model, adapter_name):
        entries = {}
        for name in layer.local_containers(adapter_name):
            if adapter_name in (container := getattr(layer, name)):
                for weight in container[adapter_name]:
                    key = f"{prefix}.{name}.{adapter_name}.{weight}"
                    entries[key] = (container[adapter_name], weight)
        if not entries or any(name in state for name in entries):
            continue
        if layer.has_fresh_local_half(adapter_name):
            for factors, weight in entries.values():
                if factors[weight].is_meta:
                    factors[weight] = nn.Parameter(
                        torch.empty_like(factors[weight], device="cpu"),
                        requires_grad=factors[weight].requires_grad,
                    )
            layer.reset_local_half(adapter_name)
        state.update({name: factors[weight].data for name, (factors, weight) in entries.items()})
