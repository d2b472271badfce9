"""Errors of the tuner layer."""

from __future__ import annotations

from peft.utils.error import NoMatchingPeftModuleError

from ..maths.errors import FedParaError


class ConfigError(FedParaError, ValueError):
    """A configuration field has a value, or meets another field, that it cannot have."""


class TargetError(FedParaError, NoMatchingPeftModuleError):
    """The target names of a configuration match no module that can be factorized."""


class UnsupportedLayerError(FedParaError, TypeError):
    """A targeted module is of a kind that cannot be factorized."""


class ReplacedWeightError(FedParaError, RuntimeError):
    """An operation needs the dense weight that ``base_weight="replaced"`` does not keep."""


class UnsupportedMethodError(FedParaError, AttributeError):
    """A method or helper of PEFT's is for other adapters than FedPara's."""


class MixedBatchError(FedParaError, ValueError):
    """``adapter_names`` names adapters for a batch that the model cannot run that way."""


class CheckpointError(FedParaError, ValueError):
    """A saved adapter or local state does not fit the model it is loaded into."""


class ConversionError(FedParaError, ValueError):
    """An adapter has no exact form in the other method."""


class LayoutError(ConversionError):
    """A file of adapters holds what no layout that is known has; the message names the key."""
