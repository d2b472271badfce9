"""Which tensors of a model are global (sent to the server) and which local (kept by the client).

Scopes are declared: a factorized layer says which of its containers are local (pFedPara's W₂), the
configuration names whole modules that are (FedPer's last layers). Every trainable tensor has
exactly one scope; so has every persistent buffer of a model whose base is not frozen.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ._peft import WRAPPER_PREFIX, AuxiliaryTrainingWrapper, match_target_against_key
from .errors import TargetError
from .layer import FedParaLayer

Scope = Literal["global", "local"]
LocalModules = Collection[str] | str | None


def tensor_scopes(model: nn.Module, local_modules: LocalModules = None) -> dict[str, Scope]:
    """The scope of every tensor that training changes, by its name in ``state_dict()``.

    Args:
        model: any module; with FedPara adapters, another PEFT adapter, or plain.
        local_modules: names or a regex of modules that stay local, beside those that the FedPara
            configuration names.

    Raises:
        TargetError: ``local_modules`` matches no module.
    """
    local = local_tensors(model, local_modules)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if trains_base(model):
        names += persistent_buffers(model)
    return {name: "local" if name in local else "global" for name in names}


def local_tensors(model: nn.Module, local_modules: LocalModules = None) -> set[str]:
    """Names of all tensors that must not leave the client, trainable or not."""
    prefixes = set()
    for name, module in model.named_modules():
        if isinstance(module, FedParaLayer):
            for adapter in module.specs:
                for container in module.local_containers(adapter):
                    prefixes.add(f"{name}.{container}.{adapter}.")
    for patterns in _declared_local_modules(model, local_modules):
        prefixes.update(f"{name}." for name in _matching_modules(model, patterns))
    starts = tuple(prefixes)
    if not starts:
        return set()
    return {name for name in _tensor_names(model) if name.startswith(starts)}


def trains_base(model: nn.Module) -> bool:
    """Whether the model trains as a whole: a plain model, or one with replaced weights."""
    tuners = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return all(isinstance(m, FedParaLayer) and m.replaced for m in tuners)


def persistent_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that ``state_dict()`` holds."""
    names = []
    for prefix, module in model.named_modules():
        for name in module._buffers:
            if name not in module._non_persistent_buffers_set and module._buffers[name] is not None:
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


def base_name(name: str) -> str:
    """A module's name in the plain model: without what PEFT and the tuner wrapped around it."""
    return saved_name(name).removeprefix(WRAPPER_PREFIX).replace(".base_layer", "")


def saved_name(name: str) -> str:
    """A name as ``state_dict()`` has it: FSDP's wrappers are in modules' names only."""
    return name.replace("_fsdp_wrapped_module.", "")


def module_matches(name: str, patterns: Collection[str] | str) -> bool:
    """PEFT's matching of names: a regex, or the end of the module's dotted name."""
    if isinstance(patterns, str):
        return bool(match_target_against_key(patterns, name))
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _declared_local_modules(model: nn.Module, extra: LocalModules) -> list[Collection[str] | str]:
    declared = [] if not extra else [extra]
    configs = getattr(model, "peft_config", None)
    for config in (configs or {}).values() if isinstance(configs, dict) else ():
        patterns = getattr(config, "local_modules", None)
        if patterns:
            declared.append(patterns)
    return declared


def _matching_modules(model: nn.Module, patterns: Collection[str] | str) -> list[str]:
    inside_adapter: set[str] = set()
    found = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inside_adapter):
            continue
        if isinstance(module, FedParaLayer | AuxiliaryTrainingWrapper):
            inside_adapter.add(f"{name}.")
        if module_matches(base_name(name), patterns):
            found.append(name)
    if not found:
        raise TargetError(
            f"local_modules={patterns!r} matches no module; the model has "
            f"{[base_name(n) for n, _ in model.named_modules() if n][:12]}"
        )
    return found


def _tensor_names(model: nn.Module) -> list[str]:
    return [*dict(model.named_parameters(remove_duplicate=False)), *persistent_buffers(model)]
