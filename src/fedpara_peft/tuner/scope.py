"""Which tensors of a model are global (sent to the server) and which local (kept by the client).

Scopes are declared: a factorized layer says which of its containers are local (pFedPara's W₂), the
configuration names whole modules that are (FedPer's last layers). Every trainable tensor has
exactly one scope; so has every persistent buffer of a model whose base is not frozen.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ._peft import AuxiliaryTrainingWrapper, is_key_under_prefixes
from .config import FedParaConfig
from .errors import TargetError
from .layer import FedParaLayer, factorized_layers, factorized_weights
from .names import base_names, module_matches

Scope = Literal["global", "local"]
LocalModules = Collection[str] | str | None


def tensor_scopes(model: nn.Module, local_modules: LocalModules = None) -> dict[str, Scope]:
    """The scope of every tensor that training changes, by its name in ``state_dict()``.

    A tensor that several modules share stands under its first name alone.

    Args:
        model: any module; with FedPara adapters, another PEFT adapter, or plain.
        local_modules: names or a regex of modules that stay local, beside those that the FedPara
            configuration names.

    Raises:
        TargetError: ``local_modules`` matches no module, or a local module shares a tensor with one
            that is not.
    """
    local = local_tensors(model, local_modules)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if trains_base(model):
        held = remainders(model)
        names += [name for name in persistent_buffers(model) if name not in held]
    return {name: "local" if name in local else "global" for name in names}


def local_tensors(model: nn.Module, local_modules: LocalModules = None) -> set[str]:
    """Names of all tensors that must not leave the client, trainable or not.

    Raises:
        TargetError: as :func:`tensor_scopes`.
    """
    prefixes = set()
    for name, layer in factorized_layers(model, remove_duplicate=False):
        for adapter, spec in layer.specs.items():
            for container in layer.local_containers(adapter):
                prefixes.add(f"{name}.{container}.{adapter}".removeprefix("."))
                if adapter in layer.merged_adapters:  # the base weight has the local half in it
                    prefixes.update(f"{name}.base_layer.{n}".removeprefix(".") for n in spec.plans)
    for patterns in _declared_local_modules(model, local_modules):
        prefixes.update(_matching_modules(model, patterns))
    if not prefixes:
        return set()
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(persistent_buffers(model, remove_duplicate=False))
    local = {name for name in tensors if is_key_under_prefixes(name, prefixes)}
    kept = {id(tensors[name]): name for name in local}
    whole = trains_base(model)
    for name, tensor in tensors.items():
        if name not in local and id(tensor) in kept and (whole or tensor.requires_grad):
            raise TargetError(
                f"{kept[id(tensor)]} is local and shared with {name}, which is not, so it would be "
                "sent under that name: put both modules into local_modules, or untie them"
            )
    return local


def factor_names(model: nn.Module) -> set[str]:
    """Names of the trainable factors of FedPara adapters, whatever their scope."""
    factors = {
        id(factor)
        for module in model.modules()
        if isinstance(module, FedParaLayer)
        for _, factor in module._factors()
    }
    return {n for n, p in model.named_parameters() if p.requires_grad and id(p) in factors}


def remainders(model: nn.Module) -> dict[str, Tensor]:
    """The remainders of a model's adapters, live, by their names in ``state_dict()``."""
    return {
        found.remainder_name: rest
        for found in factorized_weights(model)
        if (rest := found.layer.remainder(found.adapter, found.weight)) is not None
    }


def hold_remainders(model: nn.Module) -> None:
    """Give every weight of a model's adapters a remainder; see ``layer/remainder.py``."""
    for _, layer in factorized_layers(model):
        for adapter in layer.specs:
            layer.hold_remainder(adapter)
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if isinstance(config, FedParaConfig):
            config.remainder = True


def merged_but_trainable(model: nn.Module) -> str | None:
    """A trainable factor, of any tuner, that is merged into its weight: no gradient reaches it."""
    for prefix, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            for name, parameter in layer.named_parameters():
                container, adapter = [*name.split("."), ""][:2]
                ours = container in layer.adapter_layer_names and adapter in layer.merged_adapters
                if ours and parameter.requires_grad:
                    return f"{prefix}.{name}"
    return None


def trains_base(model: nn.Module) -> bool:
    """Whether the model trains as a whole: a plain model, or one trained from scratch."""
    tuners = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return all(isinstance(m, FedParaLayer) and m.from_scratch for m in tuners)


def persistent_buffers(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """The buffers that ``state_dict()`` holds, by name.

    Args:
        model: any module.
        remove_duplicate: give a buffer that modules share under its first name alone.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules(remove_duplicate=remove_duplicate):
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            if remove_duplicate and id(buffer) in seen:
                continue
            seen.add(id(buffer))
            found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


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
    plain = base_names(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or is_key_under_prefixes(name.rpartition(".")[0], inside_adapter):
            continue
        if isinstance(module, FedParaLayer | AuxiliaryTrainingWrapper):
            inside_adapter.add(name)
        if module_matches(plain[name], patterns):
            found.append(name)
    if not found:
        raise TargetError(
            f"local_modules={patterns!r} matches no module; the model has "
            f"{[name for name in dict.fromkeys(plain.values()) if name][:12]}"
        )
    return found
