"""Recurrent layers: ``torch.nn.LSTM``, ``GRU`` and ``RNN`` through their fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import MixedBatchError
from ..layer import FedParaLayer
from ..layer.mixed_batch import BASE, check_names
from ..plan import WeightShape


class Recurrent(FedParaLayer):
    """FedPara for recurrent layers: every ``weight_ih``, ``weight_hh`` and ``weight_hr``.

    Gates are factorized stacked, as the matrices the fused kernels take. Weights are composed once
    per forward pass, not once per step. A fresh weight has variance ``1 / (3 H)``, H the hidden
    size, as PyTorch's recurrent layers have.
    """

    kind = "recurrent"
    base_classes = (nn.LSTM, nn.GRU, nn.RNN)
    mixes_adapters = True

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
        """The base layer's forward with composed weights in its list of flat weights.

        ``adapter_names`` gives every sequence its own adapter; see ``mixed_batch.py``.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            return self._forward_sequences(x, *args, adapter_names=adapter_names, **kwargs)
        if self._base_alone():
            return self.base_layer(x, *args, **kwargs)
        return self._run(self._adapters_to_run(), x, *args, **kwargs)

    def _run(self, adapters: Sequence[str], x: Any, *args: Any, **kwargs: Any) -> Any:
        base_layer = self.get_base_layer()
        # Loading with assign=True leaves stale references, at which the base layer's forward would
        # rebuild the list in the middle of the swap.
        base_layer._update_flat_weights()
        names = base_layer._flat_weights_names
        plans = next(iter(self.specs.values())).plans if self.replaced else {}
        dtype = next(w.dtype for w in (*base_layer._flat_weights, x.data) if w is not None)
        weights = []
        for name in names:
            mine = [n for n in adapters if name in self.specs[n].plans]
            if name in plans:
                weight = self.get_delta_weight(next(iter(self.specs)), name).to(dtype)
            else:
                weight = getattr(base_layer, name)
                weight = self._plus_deltas(weight, name, mine)
            weights.append(weight)
        kept = base_layer._flat_weights
        try:
            base_layer._flat_weights = weights
            return base_layer(x, *args, **kwargs)
        finally:
            base_layer._flat_weights = kept

    def _forward_sequences(
        self, x: Any, hx: Any = None, *, adapter_names: Sequence[str], **kwargs: Any
    ) -> Any:
        """Run the sequences of each adapter together, and put the outputs back in order."""
        if isinstance(x, PackedSequence):
            raise MixedBatchError(
                f"adapter_names at {self._in_mixed_batch or self.kind}: a packed input has its "
                "sequences interleaved; give a padded one, or run one adapter at a time"
            )
        dim = 0 if self.get_base_layer().batch_first else 1
        check_names(self, adapter_names, int(x.shape[dim]) if x.dim() == 3 else None)
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(adapter_names):
            groups.setdefault(name if name in self.specs else BASE, []).append(i)
        parts = []
        for name, rows in groups.items():
            at = torch.tensor(rows, device=x.device)
            adapters = [] if name == BASE else [name]
            state = _of_sequences(hx, at)
            parts.append(self._run(adapters, x.index_select(dim, at), state, **kwargs))
        order = torch.tensor([i for rows in groups.values() for i in rows], device=x.device)
        back = order.argsort()
        outputs, states = zip(*parts, strict=True)
        if isinstance(states[0], tuple):  # of an LSTM: hidden and cell
            joined: Any = tuple(torch.cat(each, 1) for each in zip(*states, strict=True))
        else:
            joined = torch.cat(states, 1)
        return torch.cat(outputs, dim).index_select(dim, back), _of_sequences(joined, back)

    def __getattr__(self, name: str) -> Any:
        """Models ask recurrent layers for ``hidden_size``, ``flatten_parameters`` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            if name in next(iter(self.specs.values())).plans:
                return self.effective_weight(name)
            return getattr(self.get_base_layer(), name)


def _of_sequences(state: Any, at: Tensor) -> Any:
    """The part of a hidden state (of an LSTM's pair) that belongs to these sequences."""
    if isinstance(state, tuple):
        return tuple(part.index_select(1, at) for part in state)
    return None if state is None else state.index_select(1, at)


def _stacked(weight: Tensor, variance: float) -> WeightShape:
    m, n = weight.shape
    return WeightShape(m, n, variance=variance)
