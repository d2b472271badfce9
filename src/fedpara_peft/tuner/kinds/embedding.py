"""Embeddings: ``torch.nn.Embedding``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...maths.apply import low_rank_form
from ...maths.compose import Half, compose
from ..plan import WeightShape
from .additive import AdditiveLayer


class Embedding(AdditiveLayer):
    """FedPara for lookup tables; only the rows that a batch looks up are composed.

    A fresh table has variance 1, as ``torch.nn.Embedding`` has. The row of ``padding_idx`` is zero
    in a replaced table and untouched (ΔW = 0 there) over a frozen one. ``scale_grad_by_freq`` holds
    for the rows of ΔW as well. Gradients of factors are dense, also with ``sparse=True``.
    """

    kind = "embedding"
    base_classes = (nn.Embedding,)

    @staticmethod
    def weights_of(base_layer: nn.Module) -> dict[str, WeightShape]:
        """M = number of embeddings, N = embedding dimension."""
        assert isinstance(base_layer, nn.Embedding)
        return {"weight": WeightShape(base_layer.num_embeddings, base_layer.embedding_dim)}

    @classmethod
    def unsupported(cls, base_layer: nn.Module) -> str | None:
        """A table that is looked up in another way, or rewritten where W₀ + ΔW was meant."""
        own = type(base_layer).forward is not nn.Embedding.forward
        if own and getattr(base_layer, "embed_scale", None) is None:
            return "it does not use its weight as it is (its forward is its own)"
        if base_layer.max_norm is not None:
            return (
                f"it has max_norm={base_layer.max_norm}, which rewrites rows of the table; build "
                "the embedding without max_norm"
            )
        return None

    @property
    def zero_row(self) -> int | None:
        """The padding row."""
        padding: int | None = self.get_base_layer().padding_idx
        return padding

    @property
    def feature_dim(self) -> int:
        """A row of the table is an output."""
        return 1

    def lora_factors(self, adapter_name: str, key: str) -> dict[str, Tensor]:
        """LoRA's pair for tables, the padding row zero."""
        spec = self.specs[adapter_name]
        a, b, _ = low_rank_form(self.halves(adapter_name), spec.parameterization)
        a = a.clone()
        if self.zero_row is not None:
            a[self.zero_row] = 0
        return {"lora_embedding_A": a.T, "lora_embedding_B": self.scale_of(adapter_name) * b}

    def _forward_replaced(self, x: Tensor, adapter_name: str) -> Tensor:
        return self._rows(x, adapter_name)

    def _with_delta(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        rows = self._rows(x, adapter_name)
        p = self.specs[adapter_name].rank_dropout if self.training else 0.0
        return result + (self._drop_output_features(rows, p) if p else rows)

    def _batch_size(self, x: Tensor) -> int | None:
        return int(x.shape[0]) if x.dim() else None

    def _rows(self, ids: Tensor, adapter_name: str) -> Tensor:
        """Rows ``ids`` of the composed table: the factor X is looked up, Y is shared."""
        base_layer, spec = self.get_base_layer(), self.specs[adapter_name]
        if self._recording is not None:
            rows = F.embedding(ids, self.get_delta_weight(adapter_name))
        else:
            halves = [
                Half(F.embedding(ids.reshape(-1), half.x), half.y)
                for half in self.halves(adapter_name)
            ]
            factor = self.scale_of(adapter_name)
            rows = compose(halves, spec.parameterization, spec.nonlinearity, scale=factor)
            rows = rows.view(*ids.shape, rows.shape[-1])
            if (rest := self.remainder(adapter_name)) is not None:
                rows = torch.add(rows, F.embedding(ids, rest).to(rows.dtype), alpha=factor)
            if self.zero_row is not None:
                rows = rows * (ids != self.zero_row).unsqueeze(-1)
        if base_layer.scale_grad_by_freq and rows.requires_grad:
            rows = _divide_gradient(rows, _frequency(ids).unsqueeze(-1).to(rows.dtype))
        # Gemma's and BART's embeddings multiply what they look up.
        scale = getattr(base_layer, "embed_scale", None)
        return rows if scale is None else rows * torch.as_tensor(scale).to(rows)


def _frequency(ids: Tensor) -> Tensor:
    """How often each id stands in the batch."""
    _, place, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    found: Tensor = counts[place]
    return found


def _divide_gradient(x: Tensor, divisor: Tensor) -> Tensor:
    """The tensor itself, whose gradient comes back divided."""
    constant = x.detach()
    return constant + (x - constant) / divisor
