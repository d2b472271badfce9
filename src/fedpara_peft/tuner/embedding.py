"""Embeddings: ``torch.nn.Embedding``."""

from __future__ import annotations

from typing import Any

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

    @property
    def zero_row(self) -> int | None:
        """The padding row."""
        padding: int | None = self.get_base_layer().padding_idx
        return padding

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up the base table and add the rows of every active adapter's ΔW."""
        if self._base_alone():
            return self.base_layer(x, *args, **kwargs)
        scale = self._get_embed_scale()  # Gemma's embeddings multiply what they look up
        adapters = self._adapters_to_run()
        if self.replaced:
            rows = self._rows(x, next(iter(self.specs)))
            return rows if scale is None else rows * scale.to(rows.dtype)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter_name in adapters:
            rows = self._rows(x, adapter_name)
            if scale is not None:
                rows = rows * scale.to(rows.dtype)
            p = self.specs[adapter_name].rank_dropout if self.training else 0.0
            result = result + (self._drop_output_features(rows, p) if p else rows)
        return result.to(dtype)

    def _rows(self, ids: Tensor, adapter_name: str) -> Tensor:
        """Rows ``ids`` of the composed table: the factor X is looked up, Y is shared."""
        if self._recording is not None:
            return F.embedding(ids, self.get_delta_weight(adapter_name))
        spec = self.specs[adapter_name]
        halves = [
            Half(F.embedding(ids.reshape(-1), half.x), half.y) for half in self.halves(adapter_name)
        ]
        scale = self.scale_of(adapter_name)
        rows = compose(halves, spec.parameterization, spec.nonlinearity, scale=scale)
        rows = rows.view(*ids.shape, -1)
        return rows if self.zero_row is None else rows * (ids != self.zero_row).unsqueeze(-1)
