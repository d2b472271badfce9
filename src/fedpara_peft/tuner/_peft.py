"""Everything that reaches into PEFT's private parts, in one place.

Seen to work with peft 0.21.2; ``tests/tuner/test_peft_internals.py`` guards what is used here.
PEFT registers methods by a member of its own enum, so a plug-in has to extend the enum first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from peft import PeftModel, helpers
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import _get_encoder
from peft.tuners.mixed import model as _mixed
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    _find_minimal_target_modules,
    _get_in_out_features,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
    _maybe_include_all_linear_layers,
)
from peft.utils import PeftType, hotswap, register_peft_method, resolve_quantization_backend
from peft.utils.constants import (
    DUMMY_TARGET_MODULES,
    TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING,
)
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    get_pattern_key,
    match_target_against_key,
)
from torch import nn

from .errors import ConfigError, ReplacedWeightError, UnsupportedMethodError

__all__ = [
    "DEFAULT_TARGETS",
    "DUMMY_TARGET_MODULES",
    "FEDPARA",
    "WRAPPER_PREFIX",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "encoder_of",
    "find_minimal_names",
    "get_pattern_key",
    "hook_into_cards",
    "in_out_features",
    "is_excluded",
    "is_key_under_prefixes",
    "match_target_against_key",
    "quantization_backend_of",
    "register",
    "resolve_all_linear",
    "tuner_key_prefixes",
]

NAME = "fedpara"
#: What ``PeftModel`` puts before the names of the model it wraps.
WRAPPER_PREFIX = "base_model.model."
DEFAULT_TARGETS: dict[str, Any] = dict(TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING)
encoder_of = _get_encoder
find_minimal_names = _find_minimal_target_modules
in_out_features = _get_in_out_features
is_key_under_prefixes = _is_key_under_prefixes
resolve_all_linear = _maybe_include_all_linear_layers
tuner_key_prefixes = _get_tuner_state_dict_key_prefixes

_REQUIRED_HOOKS = (
    "_get_adapter_state_dict",
    "_get_learnable_bias_state_dict",
    "_post_injection_hook",
    "_prepare_model",
    "_remap_adapter_state_dict_for_load",
    "_remove_adapter_name_from_key",
)


def quantization_backend_of(base_layer: nn.Module, **kwargs: Any) -> Any:
    """PEFT's back-end for a quantized layer, None for a plain one.

    A plain torch layer is recognized here, because PEFT's own look-up imports every quantization
    library that is installed.
    """
    weight = getattr(base_layer, "weight", None)
    if type(base_layer).__module__.startswith("torch.nn.") and type(weight) in (
        nn.Parameter,
        type(None),
    ):
        return None
    return resolve_quantization_backend(base_layer, **kwargs)


def is_excluded(match: Any) -> bool:
    """Whether PEFT's match of a name says that the name is excluded."""
    return isinstance(match, _ExcludedModule)


def _extend_peft_type(name: str) -> PeftType:
    """Add a member to ``PeftType``; a string alone breaks ``get_model_status`` and transformers."""
    missing = [hook for hook in _REQUIRED_HOOKS if not hasattr(BaseTuner, hook)]
    if missing:
        raise ImportError(
            f"fedpara_peft needs the tuner hooks {missing}, which this version of peft lacks: "
            "pip install 'peft>=0.21,<0.22'"
        )
    upper = name.upper()
    if upper in PeftType.__members__:
        return PeftType[upper]
    member = str.__new__(PeftType, upper)
    member._name_ = upper
    member._value_ = upper
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[upper] = member
    PeftType._value2member_map_[upper] = member
    PeftType._member_names_.append(upper)
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13+
        PeftType._hashable_values_.append(upper)
    type.__setattr__(PeftType, upper, member)
    return member


FEDPARA: PeftType = _extend_peft_type(NAME)


def register(config_cls: type, model_cls: type, layer_cls: type) -> None:
    """Register the tuner with PEFT, once, ``PeftMixedModel`` included."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if FEDPARA in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    register_peft_method(
        name=NAME, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=True
    )
    _join_mixed_model(config_cls, model_cls, layer_cls)
    _join_helpers(layer_cls)


def _join_mixed_model(config_cls: Any, model_cls: Any, layer_cls: type) -> None:
    """Extend the allow-lists of ``PeftMixedModel``, which are hard-coded.

    Its dispatch is a chain of isinstance checks ending in a TypeError; ours goes before it.
    """
    import peft.tuners.mixed as mixed_package

    types = (*_mixed.COMPATIBLE_TUNER_TYPES, FEDPARA)
    _mixed.COMPATIBLE_TUNER_TYPES = types
    mixed_package.COMPATIBLE_TUNER_TYPES = types
    _mixed.PREFIXES.append(model_cls.prefix)
    _mixed.Configs = _mixed.Configs | config_cls
    _mixed.Layers = (*_mixed.Layers, layer_cls)
    stock_create = _mixed.MixedModel._create_and_replace
    stock_replace = _mixed.MixedModel._replace_module

    def _create_and_replace(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, config_cls):
            if config.from_scratch:
                raise ConfigError(
                    "PeftMixedModel adds adapters to a pretrained weight: "
                    f"base_weight={config.base_weight!r} has none; use base_weight='frozen'"
                )
            model_cls._create_and_replace(self, config, *args, **kwargs)
        else:
            stock_create(self, config, *args, **kwargs)

    def _replace_module(self: Any, parent: Any, name: str, new: Any, child: Any) -> None:
        if isinstance(new, nn.RNNBase):
            setattr(parent, name, new)
        else:
            stock_replace(self, parent, name, new, child)

    stock_merge = _mixed.MixedModel.merge_adapter
    stock_unload = _mixed.MixedModel._unload_and_optionally_merge

    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        model_cls.untie(self.model)
        stock_merge(self, *args, **kwargs)

    def _unload_and_optionally_merge(self: Any, merge: bool = True, **kwargs: Any) -> Any:
        if merge:
            model_cls.untie(self.model)
        return stock_unload(self, merge=merge, **kwargs)

    _mixed.MixedModel._create_and_replace = _create_and_replace
    _mixed.MixedModel._replace_module = _replace_module
    _mixed.MixedModel.merge_adapter = merge_adapter
    _mixed.MixedModel._unload_and_optionally_merge = _unload_and_optionally_merge


def _join_helpers(layer_cls: Any) -> None:
    """Have PEFT's helpers that are made for LoRA know our layers, or say what to do instead.

    What they look up when they are called is put in place, so that it does not matter whether a
    user imported them before.
    """
    stock_check = hotswap.check_hotswap_configs_compatible

    class Scaled(type):
        """Layers with a ``scaling``, for ``rescale_adapter_scale``."""

        def __instancecheck__(cls, module: Any) -> bool:
            if isinstance(module, layer_cls) and module.from_scratch:
                raise ReplacedWeightError(
                    "rescale_adapter_scale is not possible: the model trains from scratch, there "
                    "is no W₀ to scale against"
                )
            return isinstance(module, LoraLayer | layer_cls)

    def check_hotswap_configs_compatible(*configs: Any) -> None:
        if any(config.peft_type == FEDPARA for config in configs):
            raise UnsupportedMethodError(
                "FedPara adapters are not hot-swapped, which is LoRA's alone in PEFT: "
                "model.load_adapter(folder, adapter_name) loads other factors into an adapter "
                "that is configured alike"
            )
        stock_check(*configs)

    helpers.LoraLayer = Scaled("LoraLayer", (), {})
    hotswap.check_hotswap_configs_compatible = check_hotswap_configs_compatible


def hook_into_cards(
    write: Callable[[PeftModel, str | os.PathLike[str], Callable[[], None]], None],
) -> None:
    """Have ``write(model, folder, stock)`` write the cards of PEFT models.

    PEFT offers no hook: ``PeftModel`` writes its card when it saves, and transformers' ``Trainer``
    calls the same method after it has put its own card there. ``push_to_hub`` puts a card of
    transformers' over PEFT's after saving, so the card is written again before the upload.
    """
    stock_card = PeftModel.create_or_update_model_card
    stock_upload = PeftModel._upload_modified_files

    @functools.wraps(stock_card)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        write(self, output_dir, functools.partial(stock_card, self, output_dir))

    @functools.wraps(stock_upload)
    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if any(config.peft_type == FEDPARA for config in self.peft_config.values()):
            self.create_or_update_model_card(str(working_dir))
        return stock_upload(self, working_dir, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = _upload_modified_files
