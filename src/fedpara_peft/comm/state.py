"""The state of a model by scope: what is communicated, and what stays on the client."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..tuner.layer import factorized_layers
from ..tuner.scope import LocalModules, Scope, persistent_buffers, tensor_scopes
from .errors import StateError

State = dict[str, Tensor]

#: File that :func:`save_local` writes.
LOCAL_WEIGHTS_NAME = "local_model.safetensors"

# A client store's files, and the groups in them; see federation/store.py.
_CLIENT = re.compile(r"client-(\d+)\.round-(\d+)\.safetensors")
_GROUP = re.compile(r"local|residual|(strategy|optimizer)\..*")


def communicated_state(model: nn.Module, local_modules: LocalModules = None) -> State:
    """The tensors a client and the server exchange.

    Trainable parameters of global scope and, where the base model is not frozen, its persistent
    buffers. Names are those of ``state_dict()``; a tensor shared by several modules appears once.

    Args:
        model: any module.
        local_modules: names or a regex of modules that stay local.

    Returns:
        Detached tensors that share the model's storage, as ``state_dict()`` does; of a tensor that
        is expanded, whose entries share memory among themselves, a copy.
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
    _load(_tensors(model, "global", local_modules), state, "communicated")


def load_local_state(
    model: nn.Module, state: Mapping[str, Tensor], local_modules: LocalModules = None
) -> None:
    """Copy a local state into the model in place; see :func:`load_communicated_state`."""
    _load(_tensors(model, "local", local_modules), state, "local")
    for _, layer in factorized_layers(model):
        for adapter_name in layer.specs:
            layer.keep_local_half(adapter_name)


def save_local(
    model: nn.Module, folder: str | os.PathLike[str], local_modules: LocalModules = None
) -> Path:
    """Write the half that stays on the client to ``folder/local_model.safetensors``.

    ``save_pretrained`` and ``push_to_hub`` never write it. Keep the folder apart from what you
    push.

    Returns:
        The file's path.

    Raises:
        StateError: the model has no local tensors, or they have no values.
    """
    state = local_state(model, local_modules)
    if not state:
        raise StateError(
            "the model has no local tensors: use parameterization='pfedpara' or local_modules, and "
            "load a saved adapter with is_trainable=True"
        )
    if any(tensor.is_meta for tensor in state.values()):
        raise StateError("the local half is on the meta device, which holds no values: load one")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(_with_own_memory(state), path / LOCAL_WEIGHTS_NAME)
    return path / LOCAL_WEIGHTS_NAME


def load_local(
    model: nn.Module, path: str | os.PathLike[str], local_modules: LocalModules = None
) -> None:
    """Read the half that stays on the client.

    Args:
        model: what it is loaded into.
        path: what :func:`save_local` wrote, the folder or its file; or what a federated run keeps
            of a client, ``client-i.round-k.safetensors``, or a folder of such files of one client,
            of which the newest is taken.
        local_modules: names or a regex of modules that stay local.

    Raises:
        StateError: there is no such file, or it does not fit the model.
    """
    file = _local_file(Path(path))
    try:
        state: State = load_file(file)
    except SafetensorError as error:
        raise StateError(f"{file} is no safetensors file ({error}): write it again") from None
    if _is_client_state(file, state):
        state = split_groups(state).get("local", {})
        if not state:
            raise StateError(
                f"{file} is a client's state without a local half: its run had no local tensors"
            )
    load_local_state(model, state, local_modules)


def _local_file(path: Path) -> Path:
    """The file that a path stands for."""
    if path.is_file():
        return path
    if (path / LOCAL_WEIGHTS_NAME).is_file():
        return path / LOCAL_WEIGHTS_NAME
    found = [(f, match) for f in path.glob("client-*") if (match := _CLIENT.fullmatch(f.name))]
    clients = sorted({int(match[1]) for _, match in found})
    if len(clients) > 1:
        raise StateError(
            f"{path} holds the states of {len(clients)} clients, {clients[:3]} among them: give "
            "one's file"
        )
    if not found:
        raise StateError(f"no {LOCAL_WEIGHTS_NAME} in {path}: write one with save_local(model, …)")
    return max(found, key=lambda one: int(one[1][2]))[0]


def _is_client_state(file: Path, state: State) -> bool:
    """Whether a file is a client store's rather than :func:`save_local`'s."""
    return file.name != LOCAL_WEIGHTS_NAME and all(
        "/" in name and _GROUP.fullmatch(name.partition("/")[0]) for name in state
    )


def save_tensors(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``model.state_dict()`` as safetensors, whatever its memory is like.

    A tensor that modules share is written once, and the other names go into the file's metadata: so
    does safetensors' ``save_model``, whose ``load_model`` reads the file. That function refuses
    expanded tensors and views of one another, which are written in full here.
    """
    kept: dict[tuple[object, ...], str] = {}
    state: State = {}
    metadata = {"format": "pt"}
    for name, tensor in model.state_dict().items():
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        first = kept.setdefault(where, name) if tensor.numel() else name
        if first == name:
            state[name] = tensor
        else:
            metadata[name] = first
    save_file(_with_own_memory(state), path, metadata=metadata)


def join_groups(groups: Mapping[str, Mapping[str, Tensor]]) -> State:
    """Several states as one to write down, tensors named ``group/name``.

    Each is contiguous and in memory of its own, as safetensors asks for: of what shares another's,
    a copy.
    """
    found: State = {}
    held: set[tuple[torch.device, int]] = set()
    for group, state in groups.items():
        for name, tensor in state.items():
            whole = tensor.contiguous()
            memory = (whole.device, whole.untyped_storage().data_ptr())
            found[f"{group}/{name}"] = whole.clone() if memory in held else whole
            held.add(memory)
    return found


def split_groups(state: Mapping[str, Tensor]) -> dict[str, State]:
    """The inverse of :func:`join_groups`."""
    groups: dict[str, State] = {}
    for name, tensor in state.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def _tensors(model: nn.Module, scope: Scope, local_modules: LocalModules) -> State:
    """The model's own parameters and buffers of a scope."""
    scopes = tensor_scopes(model, local_modules)
    tensors: State = {**dict(model.named_parameters()), **persistent_buffers(model)}
    return {name: tensors[name] for name, s in scopes.items() if s == scope}


def _state(model: nn.Module, scope: Scope, local_modules: LocalModules) -> State:
    found = _tensors(model, scope, local_modules)
    return {n: t.detach().contiguous() if _is_expanded(t) else t.detach() for n, t in found.items()}


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
        if tensor.is_meta:
            raise StateError(
                f"{name} is on the meta device, which holds no values: give the model memory "
                "before, with to_empty(device=…) or by loading its weights"
            )
    with torch.no_grad():
        for name, tensor in target.items():
            if _is_expanded(tensor):  # all its entries are one in memory: each gets its own
                tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            tensor.copy_(state[name])


def _is_expanded(tensor: Tensor) -> bool:
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _with_own_memory(state: State) -> State:
    """Contiguous copies, each in memory of its own, as safetensors asks for."""
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
