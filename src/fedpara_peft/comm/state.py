"""The state of a model by scope: what is communicated, and what stays on the client."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..tuner.layer import FedParaLayer
from ..tuner.scope import LocalModules, Scope, tensor_scopes
from .errors import StateError

State = dict[str, Tensor]

#: File that :func:`save_local` writes.
LOCAL_WEIGHTS_NAME = "local_model.safetensors"


def communicated_state(model: nn.Module, local_modules: LocalModules = None) -> State:
    """The tensors a client and the server exchange.

    Trainable parameters of global scope and, where the base model is not frozen, its persistent
    buffers. Names are those of ``state_dict()``; a tensor shared by several modules appears once.

    Args:
        model: any module.
        local_modules: names or a regex of modules that stay local.

    Returns:
        Detached tensors that share the model's storage, as ``state_dict()`` does.
    """
    return _state(model, "global", local_modules)


def local_state(model: nn.Module, local_modules: LocalModules = None) -> State:
    """The trained tensors that never leave the client; see :func:`communicated_state`."""
    return _state(model, "local", local_modules)


def load_communicated_state(
    model: nn.Module, state: Mapping[str, Tensor], local_modules: LocalModules = None
) -> None:
    """Copy a communicated state into the model in place.

    Raises:
        StateError: names, shapes or dtypes differ from the model's, with nothing copied.
    """
    _load(communicated_state(model, local_modules), state, "communicated")


def load_local_state(
    model: nn.Module, state: Mapping[str, Tensor], local_modules: LocalModules = None
) -> None:
    """Copy a local state into the model in place; see :func:`load_communicated_state`."""
    _load(local_state(model, local_modules), state, "local")
    for module in model.modules():
        if isinstance(module, FedParaLayer):
            for adapter_name in module.specs:
                module.keep_local_half(adapter_name)


def save_local(
    model: nn.Module, folder: str | os.PathLike[str], local_modules: LocalModules = None
) -> Path:
    """Write the half that stays on the client to ``folder/local_model.safetensors``.

    ``save_pretrained`` and ``push_to_hub`` never write it. Keep the folder apart from what you
    push.

    Returns:
        The file's path.

    Raises:
        StateError: the model has no local tensors.
    """
    state = local_state(model, local_modules)
    if not state:
        raise StateError(
            "the model has no local tensors: use parameterization='pfedpara' or local_modules, and "
            "load a saved adapter with is_trainable=True"
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, path / LOCAL_WEIGHTS_NAME)
    return path / LOCAL_WEIGHTS_NAME


def load_local(
    model: nn.Module, folder: str | os.PathLike[str], local_modules: LocalModules = None
) -> None:
    """Read what :func:`save_local` wrote.

    Raises:
        StateError: there is no such file, or it does not fit the model.
    """
    path = Path(folder) / LOCAL_WEIGHTS_NAME
    if not path.is_file():
        raise StateError(
            f"no {LOCAL_WEIGHTS_NAME} in {folder}: write one with save_local(model, …)"
        )
    load_local_state(model, load_file(path), local_modules)


def join_groups(groups: Mapping[str, Mapping[str, Tensor]]) -> State:
    """Several states as one, tensors named ``group/name``."""
    return {f"{group}/{n}": t for group, state in groups.items() for n, t in state.items()}


def split_groups(state: Mapping[str, Tensor]) -> dict[str, State]:
    """The inverse of :func:`join_groups`."""
    groups: dict[str, State] = {}
    for name, tensor in state.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def _state(model: nn.Module, scope: Scope, local_modules: LocalModules) -> State:
    scopes = tensor_scopes(model, local_modules)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    return {name: tensors[name].detach() for name, s in scopes.items() if s == scope}


def _load(target: State, state: Mapping[str, Tensor], which: str) -> None:
    missing, unexpected = target.keys() - state.keys(), state.keys() - target.keys()
    if not target and state:
        raise StateError(
            f"the model trains nothing that is {which}, so there is nowhere to put this state: "
            "load the adapter with PeftModel.from_pretrained(…, is_trainable=True)"
        )
    if missing or unexpected:
        raise StateError(
            f"the {which} state does not have this model's tensors: {len(missing)} missing "
            f"{sorted(missing)[:3]}, {len(unexpected)} unexpected {sorted(unexpected)[:3]}; "
            "it must come from a model built and configured alike"
        )
    for name, tensor in target.items():
        if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
            raise StateError(
                f"{name} is {tuple(state[name].shape)} {state[name].dtype}, the model has "
                f"{tuple(tensor.shape)} {tensor.dtype}; same ranks and dtype are needed"
            )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(state[name])
