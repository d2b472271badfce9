"""Layers whose output is the base layer's plus that of each ΔW."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedLayerError
from ..layer import FedParaLayer


class AdditiveLayer(FedParaLayer):
    """Base of the kinds whose adapters act side by side, and can differ within a batch."""

    mixes_adapters = True

    @classmethod
    def check_replaceable(cls, base_layer: nn.Module, key: str) -> None:
        """A layer that is called in another way would not be computed in that way."""
        if "forward" in vars(base_layer):
            raise UnsupportedLayerError(
                f"{key} has a forward that was put in place of its class's, which a replaced "
                "weight would go past: use base_weight='frozen', or put it there after "
                "get_peft_model, on the adapted layer"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus ``(alpha / r) ΔW`` of every active adapter, or the composed W alone.

        ``adapter_names`` gives every sample its own adapter; see ``mixed_batch.py``.
        """
        if "adapter_names" in kwargs and not self.disable_adapters:
            return self._forward_mixed(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self._base_alone():
            return self.base_layer(x, *args, **kwargs)
        adapters = self._adapters_to_run()
        if self.replaced:
            return self._forward_replaced(x, next(iter(self.specs)))
        if len(adapters) == 1 and (joined := self._forward_joined(x, adapters[0])) is not None:
            return joined
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in adapters:
            result = self._with_delta(result, x, adapter)
        return result.to(dtype)

    def _forward_replaced(self, x: Tensor, adapter_name: str) -> Tensor:
        """The output of the composed W, which stands alone."""
        raise NotImplementedError

    def _forward_joined(self, x: Tensor, adapter_name: str) -> Tensor | None:
        """Base layer and adapter in one, None where they must stay apart."""
        return None
