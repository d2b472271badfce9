"""What a trainer of others leaves behind, beside what it trained: all of it is taken back."""

from __future__ import annotations

import copy
import gc
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from ....tuner.layer import FedParaLayer

_CONTAINERS = (dict, OrderedDict, list, set)
_CONFIGS = (PretrainedConfig, GenerationConfig)
#: Of a tensor, where hooks on it and on its gradient are.
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
#: Of this package's layers: what torch and those who patch a forward pass write there.
_OF_ANY_MODULE = {"training", "forward", "_original_forward"} | {
    name for name in vars(nn.Module()) if "hooks" in name
}
#: What a launcher says of the processes that it started.
_LAUNCHED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP",
)  # fmt: skip


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards nothing of a model has changed but the values of its parameters and buffers.

    Trainers put hooks on embeddings, exchange forward passes (mixed precision, fused heads), turn
    gradient checkpointing on, edit the config, cast or move what they train. The next client, and
    whoever uses the model later, must meet none of it, nor two of it.

    Args:
        model: its tensors keep their memory, which others refer to.
    """
    modules = [(m, _attributes(m)) for m in model.modules()]
    inside = [
        (value, value.copy())
        for _, before in modules
        for value in before.values()
        if type(value) in _CONTAINERS
    ]
    buffers = [(m, name, b) for m, _ in modules for name, b in m._buffers.items() if b is not None]
    parameters = [
        (p, p.data, p.requires_grad, {name: dict(getattr(p, name) or {}) for name in _TENSOR_HOOKS})
        for p in model.parameters()
    ]
    configs = [(config, _copied(config)) for config in _configs(modules)]
    try:
        yield
    finally:
        moved = [(old, m._buffers.get(name)) for m, name, old in buffers]
        for module, before in modules:
            now = vars(module)
            for name in _own_names(module) - before.keys():
                del now[name]
            now.update(before)
        for container, content in inside:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        with torch.no_grad():
            for old, new in moved:
                if new is not None and new is not old:
                    old.copy_(new)
            for parameter, data, requires_grad, hooks in parameters:
                _put_back(parameter, data)
                parameter.requires_grad_(requires_grad)
                parameter.grad = None
                for name, kept in hooks.items():
                    found = getattr(parameter, name) or {}
                    for key in found.keys() - kept.keys():
                        del found[key]
        for config, content in configs:
            vars(config).clear()
            vars(config).update(content)


@contextmanager
def alone() -> Iterator[None]:
    """A trainer finds itself the only one, in the precision that it wants.

    Accelerate keeps one state for all of a process. A trainer made in it would want to share its
    client with the other processes, which have clients of their own, could not choose another
    precision, and making its arguments would start the state anew.
    """
    states = [PartialState._shared_state, AcceleratorState._shared_state]
    states.append(GradientState._shared_state)
    kept = [dict(state) for state in states]
    environment, verbosity = dict(os.environ), transformers_logging.get_verbosity()
    solo = {
        "distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0,
        "local_process_index": 0, "backend": None, "fork_launched": False,
    }  # fmt: skip
    try:
        for name in _LAUNCHED:
            os.environ.pop(name, None)
        states[0].update({name: value for name, value in solo.items() if name in states[0]})
        states[1].clear()
        yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def collecting_its_own() -> Iterator[None]:
    """Let garbage collections look at what is made meanwhile, not at all that the process has.

    Trainers ask for one to free their optimizer, twice a turn; through everything that was imported
    it takes longer than a small client's steps. Whoever has frozen objects already is left alone.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _own_names(module: nn.Module) -> set[str]:
    """Names of the attributes that are put back: of our layers, not what they note themselves."""
    names = set(vars(module))
    return names & _OF_ANY_MODULE if isinstance(module, FedParaLayer) else names


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _own_names(module)}


def _put_back(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter its memory back, with the values that it has now."""
    now = parameter.data
    if type(now) is not Tensor:  # quantized by torchao, say: frozen, and without one memory
        return
    if (now.data_ptr(), now.dtype, now.device) != (data.data_ptr(), data.dtype, data.device):
        parameter.data = data
        parameter.copy_(now)  # in place: who remembers a version of it sees that it is another


def _configs(modules: list[tuple[nn.Module, dict[str, Any]]]) -> list[Any]:
    """All configs that modules have, and those within them, once each."""
    found: dict[int, Any] = {}
    waiting = [value for _, before in modules for value in before.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _CONFIGS) and id(value) not in found:
            found[id(value)] = value
            waiting += vars(value).values()
    return list(found.values())


def _copied(config: Any) -> Mapping[str, Any]:
    """A config's entries; configs within it stay the objects that they are."""
    return {
        name: value if isinstance(value, _CONFIGS) else copy.deepcopy(value)
        for name, value in vars(config).items()
    }
