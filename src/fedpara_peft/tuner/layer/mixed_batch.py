"""Batches in which every sample has its own adapter (``adapter_names=[…]``), in inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._peft import AuxiliaryTrainingWrapper, encoder_of
from ..errors import MixedBatchError

if TYPE_CHECKING:
    from .base import FedParaLayer

#: The name that stands for the model without an adapter.
BASE = "__base__"


@contextmanager
def each_sample_its_adapter(
    model: nn.Module,
    layers: dict[str, FedParaLayer],
    adapter_names: Any,
    num_beams: int,
) -> Iterator[None]:
    """Hand every layer the names of the samples' adapters while the block runs.

    Args:
        model: the model that holds the layers.
        layers: its factorized layers, by name.
        adapter_names: one name for each sample; ``"__base__"`` is the model without an adapter.
        num_beams: how often generation repeats each sample. An encoder sees them once.

    Raises:
        MixedBatchError: not a list of names, a name that no layer knows, or a model in training.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise MixedBatchError(
            f"adapter_names must be a list with one name for each sample, got {adapter_names!r}"
        )
    if model.training:
        raise MixedBatchError(
            "adapter_names is for inference, and the model is in training mode: call model.eval(), "
            "or train one adapter at a time with set_adapter"
        )
    known = {name for layer in layers.values() for name in layer.specs}
    if unknown := sorted(set(map(str, adapter_names)) - known - {BASE}):
        raise MixedBatchError(
            f"adapter_names holds {', '.join(unknown)}; the model has {', '.join(sorted(known))} "
            f"and {BASE}, the model without an adapter"
        )
    once = list(adapter_names)
    repeated = [name for name in once for _ in range(num_beams)]
    encoder = encoder_of(model) if num_beams > 1 else None
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    mixing = {layer for layer in layers.values() if layer.mixes_adapters}
    handles = []
    try:
        for name, layer in layers.items():
            layer._in_mixed_batch = name
        for module in model.modules():
            if module in mixing or isinstance(module, AuxiliaryTrainingWrapper):
                hook = partial(_add_names, once if module in in_encoder else repeated)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer._in_mixed_batch = None


def _add_names(names: list[str], module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "adapter_names": names}


def check_names(layer: FedParaLayer, adapter_names: Sequence[str], samples: int | None) -> None:
    """Raise :class:`MixedBatchError` unless this layer can run this batch."""
    if layer.from_scratch:
        raise MixedBatchError(
            "adapter_names needs adapters over a pretrained weight: trained from scratch there is "
            "one set of factors, and they are the weight; leave adapter_names out"
        )
    if layer.merged:
        raise MixedBatchError(
            f"adapter_names with adapters merged ({', '.join(layer.merged_adapters)}): every "
            "sample would have them; call unmerge_adapter() first"
        )
    if samples != len(adapter_names):
        raise MixedBatchError(
            f"adapter_names has {len(adapter_names)} names for {samples or 'an input without'} "
            f"samples at {layer._in_mixed_batch or type(layer).__name__}: give one name for each "
            "sample of the batch; a layer that does not see the batch (of positions, of experts) "
            "belongs into exclude_modules"
        )


class UnreadableWeight(Tensor):
    """What a weight reads as in such a batch: it has a shape and dtype, and no one value."""

    _layer: str

    @classmethod
    def like(cls, weight: Tensor, layer: str) -> UnreadableWeight:
        """A stand-in for the weight of the layer of this name."""
        made: UnreadableWeight = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        made._layer = layer
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Without the values that are not there."""
        return f"UnreadableWeight({self._layer}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse every computation."""
        found: list[str] = []
        torch.utils._pytree.tree_map_only(cls, lambda t: found.append(t._layer), (args, kwargs))
        raise MixedBatchError(
            f"adapter_names: the parent of {found[0]} reads its weight and computes with it by "
            "itself, which knows one weight for all samples: run one adapter at a time with "
            "set_adapter, or put the layer into exclude_modules"
        )
