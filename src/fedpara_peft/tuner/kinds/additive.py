"""Layers whose output is the base layer's plus that of each ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayerError
from ..layer import FedParaLayer
from ..layer.mixed_batch import BASE, check_names


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
        result = self._base_output(x, *args, **kwargs)
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

    def _forward_mixed(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any
    ) -> Tensor:
        """The base layer's output, and on each sample's the ΔW of that sample's adapter."""
        check_names(self, adapter_names, self._batch_size(x))
        result = self._base_output(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name != BASE and name in self.specs:
                at = [i for i, other in enumerate(adapter_names) if other == name]
                index = torch.tensor(at, device=result.device)
                part = self._with_delta(result[index], x[index.to(x.device)], name)
                result = result.index_copy(0, index, part.to(result.dtype))
        return result

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if not isinstance(result, Tensor):
            raise UnsupportedLayerError(
                f"{type(self.get_base_layer()).__name__} returns a {type(result).__name__}, to "
                "which no ΔW can be added (a router of experts?): put it into exclude_modules"
            )
        return result

    def _batch_size(self, x: Any) -> int | None:
        """Samples in an input, None where it is not batched."""
        return int(x.shape[0]) if x.dim() > 1 else None

    def _with_delta(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """``result`` with what one adapter adds to it."""
        raise NotImplementedError
