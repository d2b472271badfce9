"""Embeddings: ``torch.nn.Embedding``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..maths.compose import Half, compose
from .errors import UnsupportedLayerError
from .layer import FedParaLayer
from .plan import WeightShape


class Embedding(FedParaLayer):
    """FedPara for lookup tables; only the rows that a batch looks up are composed.

    A fresh table has variance 1, as ``torch.nn.Embedding`` has. The row of ``padding_idx`` is zero
    in a replaced table and untouched (ΔW = 0 there) over a frozen one.
    """

    kind = "embedding"

    @staticmethod
    def weights_of(base_layer: nn.Module) -> dict[str, WeightShape]:
        """M = number of embeddings, N = embedding dimension."""
        assert isinstance(base_layer, nn.Embedding)
        return {"weight": WeightShape(base_layer.num_embeddings, base_layer.embedding_dim)}

    @classmethod
    def check_replaceable(cls, base_layer: nn.Module, key: str) -> None:
        """A table that renormalizes its rows in place has none to renormalize."""
        if getattr(base_layer, "max_norm", None) is not None:
            raise UnsupportedLayerError(
                f"{key} has max_norm={base_layer.max_norm}, which rewrites rows of the table; "
                "with base_weight='replaced' build the embedding without max_norm"
            )

    def to_base_layout(self, weight: Tensor, shape: WeightShape) -> Tensor:
        """Zero the padding row."""
        padding = self.get_base_layer().padding_idx
        if padding is None:
            return weight
        return weight.index_fill(0, torch.tensor([padding], device=weight.device), 0)

    def _rows(self, ids: Tensor, adapter_name: str) -> Tensor:
        """Rows ``ids`` of the composed table: the factor X is looked up, Y is shared."""
        spec = self.specs[adapter_name]
        if self._recording is not None:
            return F.embedding(ids, self.get_delta_weight(adapter_name))
        halves = [
            Half(F.embedding(ids.reshape(-1), half.x), half.y) for half in self.halves(adapter_name)
        ]
        rows = compose(halves, spec.parameterization, spec.nonlinearity)
        rows = rows.view(*ids.shape, -1)
        base_layer = self.get_base_layer()
        if base_layer.padding_idx is not None:
            rows = rows * (ids != base_layer.padding_idx).unsqueeze(-1)
        if not spec.replaced and self.scaling[adapter_name] != 1:
            rows = rows * self.scaling[adapter_name]
        return rows

    def _delta_output(self, x: Tensor, adapter_name: str) -> Tensor:
        rows = self._rows(x, adapter_name)
        scale = self._get_embed_scale()  # Gemma's embeddings multiply what they look up
        return rows if scale is None else rows * scale.to(rows.dtype)

    def _forward_replaced(self, x: Tensor, adapter_name: str) -> Tensor:
        return self._rows(x, adapter_name)
