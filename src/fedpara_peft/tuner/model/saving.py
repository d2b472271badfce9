"""What of a model PEFT saves, and how it is loaded again."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .._peft import is_key_under_prefixes
from ..config import FedParaConfig
from ..errors import CheckpointError
from ..layer import FACTOR_CONTAINER, REMAINDER_CONTAINER, factorized_layers, factorized_weights
from ..names import saved_name
from ..scope import local_tensors
from .checkpoint import (
    auxiliary_names,
    base_weight_names,
    fill_local_half,
    give_memory,
    remap_rest,
    saved_modules,
    squeeze_cores,
)


class SavedModel(BaseTuner):
    """Part of :class:`~fedpara_peft.tuner.model.FedParaModel`: PEFT's hooks on state dicts."""

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
        if config.from_scratch:
            for name in base_weight_names(model, adapter_name):
                state_dict.pop(name, None)
            left_out = auxiliary_names(model)
            return {k: v for k, v in state_dict.items() if not is_key_under_prefixes(k, left_out)}
        _take_adapters_out(model, state_dict)
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: FedParaConfig
    ) -> dict[str, Tensor]:
        found = super()._get_learnable_bias_state_dict(model, state_dict, config)
        if config.bias != "none":
            for prefix, layer in factorized_layers(model):
                for name in layer.bias_names():
                    key = f"{saved_name(prefix)}.base_layer.{name}"
                    if key in state_dict:  # a local module's is not
                        found[key] = state_dict[key]
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Only behind a container of factors: the model may have modules of the adapter's name.
        parts = key.split(".")
        for i in range(len(parts) - 1, 0, -1):
            ours = parts[i - 1] == REMAINDER_CONTAINER or FACTOR_CONTAINER.fullmatch(parts[i - 1])
            if parts[i] == adapter_name and ours:
                return ".".join(parts[:i] + parts[i + 1 :])
        return key

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # From scratch factors are the weight: they keep the dtype that the model was built in.
        if not self.peft_config[adapter_name].from_scratch:
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
        if config.from_scratch:
            remove = cls._remove_adapter_name_from_key
            remapped = remap_rest(model, adapter_name, remapped, remove)
        if config.form.local_halves:
            fill_local_half(model, adapter_name, remapped)
        give_memory(model, remapped)
        return remapped


@torch.no_grad()
def _take_adapters_out(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Of tables of embeddings that are merged: the adapters are saved as such."""
    for found in factorized_weights(model):
        name = saved_name(found.base_name)
        is_table = isinstance(found.layer.get_base_layer(), nn.Embedding)
        if is_table and found.layer.merged and name in state:
            state[name] = found.layer.base_without_adapters(found.weight)


def _refuse_lost_layers(model: nn.Module, adapter_name: str, others: list[str]) -> None:
    """PEFT takes a module named as another adapter for a part of that one, and leaves it out."""
    for name, _ in factorized_layers(model, adapter_name):
        taken = set(others).intersection(name.split("."))
        if taken:
            raise CheckpointError(
                f"PEFT would leave {name} out of adapter {adapter_name!r}, because another "
                f"adapter is called {min(taken)!r} as a module is: give that one another name"
            )
