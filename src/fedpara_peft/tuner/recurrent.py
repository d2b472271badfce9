"""Recurrent layers: ``torch.nn.LSTM``, ``GRU`` and ``RNN`` through their fused kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layer import FedParaLayer, inverted_mask
from .plan import WeightShape


class Recurrent(FedParaLayer):
    """FedPara for recurrent layers: every ``weight_ih``, ``weight_hh`` and ``weight_hr``.

    Gates are factorized stacked, as the matrices the fused kernels take. Weights are composed once
    per forward pass, not once per step. A fresh weight has variance ``1 / (3 H)``, H the hidden
    size, as PyTorch's recurrent layers have.
    """

    kind = "recurrent"

    @staticmethod
    def weights_of(base_layer: nn.Module) -> dict[str, WeightShape]:
        """M = stacked gate outputs (or the projection), N = inputs of that matrix."""
        assert isinstance(base_layer, nn.RNNBase)
        variance = 1 / (3 * base_layer.hidden_size)
        return {
            name: _stacked(getattr(base_layer, name), variance)
            for name in base_layer._flat_weights_names
            if name.startswith("weight")
        }

    @staticmethod
    def features_of(base_layer: nn.Module) -> tuple[int, int]:
        """Input size, and the size of an output of one direction."""
        assert isinstance(base_layer, nn.RNNBase)
        return base_layer.input_size, base_layer.proj_size or base_layer.hidden_size

    @property
    def weight(self) -> Tensor:
        """A recurrent layer has several weights and none of this name."""
        raise AttributeError(
            "a recurrent layer has no `weight`; see get_delta_weight(adapter, name)"
        )

    @property
    def bias(self) -> bool:
        """Whether the layer has biases, as on the plain layer."""
        return bool(self.get_base_layer().bias)

    def bias_names(self) -> tuple[str, ...]:
        """Names of the biases of all layers and directions."""
        names = self.get_base_layer()._flat_weights_names
        return tuple(name for name in names if name.startswith("bias"))

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with composed weights in its list of flat weights."""
        base_layer = self.get_base_layer()
        if self._base_alone():
            return self.base_layer(x, *args, **kwargs)
        # Loading with assign=True leaves stale references, at which the base layer's forward would
        # rebuild the list in the middle of the swap.
        base_layer._update_flat_weights()
        weights = [getattr(base_layer, name) for name in base_layer._flat_weights_names]
        position = {name: i for i, name in enumerate(base_layer._flat_weights_names)}
        dtype = next(w.dtype for w in (*weights, x.data) if w is not None)
        for adapter_name in self._adapters_to_run():
            spec = self.specs[adapter_name]
            for name in spec.plans:
                delta = self.get_delta_weight(adapter_name, name)
                if self.training and spec.rank_dropout:
                    mask = inverted_mask(delta, delta.shape[0], spec.rank_dropout)
                    delta = delta * mask.unsqueeze(1)
                base = weights[position[name]]
                composed = delta if spec.replaced else base + delta
                weights[position[name]] = composed.to(dtype)
        kept = base_layer._flat_weights
        try:
            base_layer._flat_weights = weights
            return base_layer(x, *args, **kwargs)
        finally:
            base_layer._flat_weights = kept

    def __getattr__(self, name: str) -> Any:
        """Models ask recurrent layers for ``hidden_size``, ``flatten_parameters`` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.get_base_layer(), name)


def _stacked(weight: Tensor, variance: float) -> WeightShape:
    m, n = weight.shape
    return WeightShape(m, n, variance=variance)
