"""What PEFT asks of a layer beside its forward pass: adapters on and off, chosen, deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import quantization_extra_repr
from torch import nn

from ..errors import ReplacedWeightError


class ShownModule(nn.Module):
    """A module that shows itself as PEFT's own layers do.

    Apart from the other parts, which stand behind ``nn.Module`` and would be hidden by it.
    """

    def __repr__(self) -> str:
        """With the method's name, which ``get_layer_status()`` shows."""
        return "fedpara." + super().__repr__()

    def extra_repr(self) -> str:
        """Name the quantization back-end."""
        return quantization_extra_repr(self)


class SwitchedLayer(BaseTunerLayer):
    """Part of :class:`~fedpara_peft.tuner.layer.FedParaLayer`: PEFT's switches."""

    _trained: set[str] | None  # factors to train again when adapters come back on

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters on or off; a replaced weight cannot be turned off.

        Back on, they train again if they did before: PEFT itself would train adapters that were
        loaded for inference.
        """
        if enabled == (not self.disable_adapters):
            return
        if not enabled:
            self._refuse_from_scratch(
                "disabling adapters", "the factors are the weight; build the plain model instead"
            )
            self._trained = {name for name, p in self._factors() if p.requires_grad}
            super().enable_adapters(False)
            return
        trained, self._trained = self._trained, None
        super().enable_adapters(True)
        if trained is not None:
            for name, factor in self._factors():
                factor.requires_grad_(name in trained)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters, which train unless ``inference_mode``."""
        self._trained = None
        super().set_adapter(adapter_names, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; a replaced weight cannot be removed."""
        if adapter_name in self.specs:
            self._refuse_from_scratch(
                "delete_adapter", "the factors are the weight; use merge_and_unload() first"
            )
        super().delete_adapter(adapter_name)
        self._zeroed.pop(adapter_name, None)

    def _refuse_from_scratch(self, what: str, instead: str) -> None:
        for spec in self.specs.values():
            if spec.from_scratch:
                raise ReplacedWeightError(
                    f"{what} is not possible: base_weight={spec.base_weight!r}, {instead}"
                )

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        # Recurrent layers have no `weight`, and a freed one says nothing.
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            for parameter in base_layer.parameters():
                return parameter.device, parameter.dtype
        return device, dtype
