"""A layer between two layouts: its factors, and how they are scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....maths.apply import low_rank_form
from ....maths.approximation.truncate import (
    LowRankPair,
    exact_pair,
    frobenius_norm,
    relative_error,
    truncate,
)
from ....maths.halves import Half, LowRankForm
from ....maths.parameterizations import FEDPARA, get_parameterization
from ...errors import ConversionError, LayoutError
from .base import BaseLayer


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to one weight: ``(alpha / rank) · W(halves)``.

    Attributes:
        name: the module; as the base model calls it where that is known.
        component: the part of a pipeline that it is in, "" where there is only one.
        underscored: whether the name's dots are still underscores.
        parameterization: how the halves make the weight: ``"fedpara"`` is a LoHa, ``"lowrank"`` a
            LoRA or LoCon.
        halves: the factors, X ``(M, r)``, Y ``(N, r)`` or ``(N · K, r)``, T ``(r, r, *kernel)``.
        rank: r.
        alpha: numerator of the scale.
        kernel: the convolution's kernel size, () for a linear layer; None where the layout does not
            say whether a matrix is a linear layer or a reshaped kernel.
        embedding: whether it is a table, of rows M.
        transposed: whether the module keeps its weight as ``(N, M)``.
        alpha_tensor: alpha as the file had it, so that it is written so again.
        dora_scale: the magnitudes of a weight-decomposed adapter, None where it is none.
    """

    name: str
    component: str
    underscored: bool
    parameterization: str
    halves: tuple[Half, ...]
    rank: int
    alpha: float
    kernel: tuple[int, ...] | None = None
    embedding: bool = False
    transposed: bool = False
    alpha_tensor: Tensor | None = None
    dora_scale: Tensor | None = None

    @property
    def scale(self) -> float:
        """The factor on the composed weight."""
        return self.alpha / self.rank

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return self.halves[0].x.dtype

    @property
    def is_loha(self) -> bool:
        """Whether it is the Hadamard product of two halves."""
        return self.parameterization == FEDPARA.name

    @property
    def has_core(self) -> bool:
        """Whether it is a kernel in Tucker form."""
        return self.halves[0].t is not None

    @property
    def exact_rank(self) -> int:
        """Columns of the exact low-rank form."""
        ranks = [half.x.shape[1] for half in self.halves]
        return get_parameterization(self.parameterization).form_rank(ranks)

    def form(self, dtype: torch.dtype | None = None) -> LowRankForm:
        """The exact low-rank form of the composed weight, without the scale."""
        halves = self.halves if dtype is None else [half.to(dtype) for half in self.halves]
        return low_rank_form(halves, self.parameterization)

    def on(self, name: str, base: BaseLayer) -> Layer:
        """The same layer on a module of the base model.

        Args:
            name: the module's name there.
            base: the module.

        Raises:
            LayoutError: its weight has another shape.
        """
        rows, columns, *rest = base.shape[::-1] if base.transposed else base.shape
        kernel, halves = tuple(rest), self.halves
        if self.has_core:
            halves = tuple(half._replace(t=_without_ones(half.t, len(kernel))) for half in halves)
            own: tuple[int, ...] | None = tuple(halves[0].tensors()[2].shape[2:])
        else:
            columns *= math.prod(kernel)
            own = self.kernel
        x, y, _ = halves[0]
        fits = (x.shape[0], y.shape[0]) == (rows, columns)
        if not fits or (own or kernel) != kernel:
            raise LayoutError(
                f"{self.name} adds {_shown(self)} to {name} of the base model, which is "
                f"{base.shape}: name the model that it was trained on"
            )
        return replace(
            self, name=name, underscored=False, halves=halves, kernel=kernel,
            transposed=base.transposed, embedding=base.embedding,
        )  # fmt: skip


@dataclass(frozen=True)
class LoraLayer:
    """A layer as a LoRA of scale 1.

    Attributes:
        down: ``(k, N)``, a convolution's ``(k, N, *kernel)``; ``(k, M)`` of a table of M rows.
        up: ``(M, k)``, a convolution's ``(M, k, 1, …)``; ``(N, k)`` of a table.
        exact_rank: the rank of the exact form.
        error: relative Frobenius error of these very factors; 0 for the exact form, which is
            rounded as any product is.
        norm: Frobenius norm of the update; 0.0 where nothing was to be approximated.
    """

    down: Tensor
    up: Tensor
    exact_rank: int
    error: float
    norm: float

    @property
    def rank(self) -> int:
        """The rank k."""
        return self.down.shape[0]


def as_lora(layer: Layer, *, rank: int | None = None, tolerance: float | None = None) -> LoraLayer:
    """A layer as the LoRA that it is, or as the best one of a rank or within an error.

    A rank at or above that of the exact form gives the exact form. Factors keep their dtype; the
    error counts what is lost by rounding the best ones to it.

    Args:
        layer: the layer.
        rank: k, None for the exact form.
        tolerance: relative Frobenius error that is allowed.

    Raises:
        ConversionError: the adapter is weight-decomposed (DoRA).
    """
    if layer.dora_scale is not None:
        raise ConversionError(
            f"{layer.name} has a dora_scale: a weight-decomposed adapter depends on the base "
            "weight and is no LoRA; write it as lycoris or loha, or merge it"
        )
    half, error, norm, pair = layer.dtype.itemsize < 4, 0.0, 0.0, None
    exact_rank = layer.exact_rank
    if rank is not None or tolerance is not None:
        form = _lora_form(layer, torch.float64)
        found = truncate(form, rank=rank, tolerance=tolerance, scale=layer.scale)
        norm = float(found.singular_values.square().sum().sqrt())
        if found.pair.up.shape[1] < exact_rank:
            pair = LowRankPair(*(factor.to(layer.dtype) for factor in found.pair))
            error = found.error
    if pair is None:
        pair = exact_pair(_lora_form(layer), layer.scale)
    if half:
        form = _lora_form(layer, torch.float64)
        error, norm = relative_error(form, pair, layer.scale), frobenius_norm(form, layer.scale)
    up, down = pair
    kernel = layer.kernel
    if kernel is None and layer.has_core:
        kernel = tuple(down.shape[2:])
    if kernel:
        down = down.reshape(down.shape[0], -1, *kernel)
        up = up.reshape(*up.shape, *[1] * len(kernel))
    return LoraLayer(down.contiguous(), up.contiguous(), exact_rank, error, norm)


def loha_half(own: Mapping[str, Tensor], names: Sequence[str], dims: int | None = None) -> Half:
    """A half from LoHa's factors by their names; ``dims``: of the kernel, where it is known."""
    a, b, core = own[names[0]], own[names[1]], own.get(names[2])
    if core is not None and dims is not None:
        core = _without_ones(core, dims)
    return Half(a if core is None else a.T, b.T, core)


def _lora_form(layer: Layer, dtype: torch.dtype | None = None) -> LowRankForm:
    """The form of what LoRA multiplies by: of a table, whose rows are looked up in down, Wᵀ."""
    form = layer.form(dtype)
    return form._replace(a=form.b, b=form.a) if layer.embedding else form


def _without_ones(core: Tensor | None, dims: int) -> Tensor | None:
    """A core whose kernel has no more dimensions: PEFT keeps a Conv1d's as k x 1."""
    if core is None or core.shape[2 + dims :] != (1,) * (core.dim() - 2 - dims):
        return core
    return core.reshape(core.shape[: 2 + dims])


def _shown(layer: Layer) -> str:
    x, y, t = layer.halves[0]
    kernel = () if t is None else t.shape[2:]
    return f"a ({', '.join(map(str, (x.shape[0], y.shape[0], *kernel)))})"
