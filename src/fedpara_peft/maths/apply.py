"""Apply a factorized weight without composing it.

A Hadamard product of two low-rank matrices is itself low-rank, with factors that are cheap:

    (X₁ Y₁ᵀ) ⊙ (X₂ Y₂ᵀ) = A Bᵀ,   A = X₁ ⋆ X₂ (M, r²),   B = Y₁ ⋆ Y₂ (N, r²)

⋆ is the row-wise Khatri–Rao product. So ``x Wᵀ = (x B) Aᵀ`` needs no M x N matrix: FedPara of
rank r costs what LoRA of rank r² costs, and *is* one. pFedPara, ``W₁ ⊙ (W₂ + 1)``, adds the
columns X₁ and Y₁. For kernels (Prop. 3) the core is the Kronecker product of T₁ and T₂ at each
kernel position. With tanh there is no such form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import RankError
from .halves import Half, LowRankForm, Nonlinearity, khatri_rao
from .parameterizations import get_parameterization
from .precision import as_given

__all__ = [
    "LowRankForm",
    "by_rows",
    "form_rank",
    "has_low_rank_form",
    "khatri_rao",
    "linear",
    "low_rank_form",
]


def has_low_rank_form(nonlinearity: Nonlinearity) -> bool:
    """Whether the composed weight equals a product of its factors' Khatri–Rao products."""
    return nonlinearity is None


def low_rank_form(halves: Sequence[Half], parameterization: str) -> LowRankForm:
    """The exact low-rank form of a composed weight (no nonlinearity).

        lowrank    R = r         A = X₁,              B = Y₁
        fedpara    R = r₁ r₂     A = X₁ ⋆ X₂,         B = Y₁ ⋆ Y₂
        pfedpara   R = r₁ r₂ + r₁    A = [X₁ ⋆ X₂, X₁],   B = [Y₁ ⋆ Y₂, Y₁]

    Kernels: the core is ``T₁ ⊗ T₂`` at each position (pfedpara: block-diagonal with T₁).

    Args:
        halves: as many as the parameterization has.
        parameterization: the form of the weight.

    Returns:
        The form; differentiable with respect to the factors.
    """
    return get_parameterization(parameterization).low_rank_form(halves)


def form_rank(r: int, parameterization: str) -> int:
    """R, the number of columns of the low-rank form."""
    own = get_parameterization(parameterization)
    return own.form_rank([r] * own.num_halves)


def linear(
    x: Tensor,
    halves: Sequence[Half],
    parameterization: str = "fedpara",
    scale: float = 1.0,
    *,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    keep_form: bool = False,
) -> Tensor:
    """Apply a factorized matrix to activations without composing it.

        y = base + x W₀ᵀ + bias + scale · (x B) Aᵀ

    For the backward pass only x, the factors, W₀ and ``x B`` are kept; A and B are made again. With
    W₀ given, both products share their sums, forward and backward, which saves passes over the
    activations. Products run in x's dtype, forward and backward, whatever autocast says (bfloat16
    activations over float32 factors stay bfloat16; the factors' gradients come back in the factors'
    dtype). Differentiable twice. Without gradients a few rows of x go :func:`by_rows`.

    Args:
        x: activations ``(..., N)``.
        halves: matrix halves.
        parameterization: the form of the weight.
        scale: factor on the product.
        base: tensor ``(..., M)`` to add to, None for zero. It is not modified.
        weight: W₀ ``(M, N)``, None for zero; not together with ``base``.
        bias: ``(M,)``, None for zero; not together with ``base``.
        keep_form: keep A and B for the backward pass; for small weights, where making them again
            costs more time than their memory is worth.

    Returns:
        ``(..., M)``, dtype of x.

    Raises:
        RankError: a half has a core (a convolution kernel).
    """
    if any(half.t is not None for half in halves):
        raise RankError("a half with a core is a convolution kernel, not a matrix: use conv stages")
    flat = x.reshape(-1, x.shape[-1])
    few = not torch.is_grad_enabled() and not for_any_batch_size()
    few = few and flat.shape[0] <= halves[0].x.shape[1]
    if few or _is_transformed():
        with as_given(x.device):
            if few:
                out = scale * by_rows(flat, halves, parameterization)
                out = out.view(*x.shape[:-1], out.shape[-1])
            else:
                a, b, _ = low_rank_form(halves, parameterization)
                out = scale * ((x @ b.to(x.dtype)) @ a.to(x.dtype).T)
            for part in (base, bias, None if weight is None else x @ weight.T):
                out = out if part is None else out + part
        return out.to(x.dtype)
    factors = [factor for half in halves for factor in half.tensors()]
    flat_base = None if base is None else base.reshape(-1, base.shape[-1]).to(x.dtype)
    result: Tensor = _KhatriRaoLinear.apply(  # type: ignore[no-untyped-call]
        parameterization, scale, keep_form, flat, flat_base, weight, bias, *factors
    )
    return result.view(*x.shape[:-1], result.shape[-1])


def by_rows(x: Tensor, halves: Sequence[Half], parameterization: str = "fedpara") -> Tensor:
    """``x Wᵀ`` without A and B: cheaper while x has no more than r rows.

        H = Y₁ᵀ diag(x) Y₂,   W x = rowsum((X₁ H) ⊙ X₂)      for each row x

    The same multiplications as by the form, but r columns are written a row of x, not r² in all.

    Args:
        x: activations ``(T, N)``.
        halves: matrix halves.
        parameterization: the form of the weight.

    Returns:
        ``(T, M)``, in the wider dtype of x and the factors.
    """
    dtype = torch.promote_types(x.dtype, halves[0].x.dtype)
    x, halves = x.to(dtype), [half.to(dtype) for half in halves]
    return get_parameterization(parameterization).by_rows(x, halves)


class _KhatriRaoLinear(torch.autograd.Function):
    """``base + x W₀ᵀ + bias + s (x B) Aᵀ``.

    What runs in here is dispatched anew, autocast included, which would bring products to another
    dtype than the sums around them: it is off, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with as_given(args[3].device):
            return _KhatriRaoLinear._forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with as_given(grad.device):
            return _KhatriRaoLinear._backward(ctx, grad)

    @staticmethod
    def _forward(
        ctx: Any,
        parameterization: str,
        scale: float,
        keep_form: bool,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        a, b, _ = low_rank_form(_pairs(factors), parameterization)
        a, b = a.to(x.dtype), b.to(x.dtype)
        h = x @ b
        kept = (a, b) if keep_form else (None, None)
        ctx.save_for_backward(x, h, weight, *kept, *factors)
        ctx.parameterization, ctx.scale = parameterization, scale
        if weight is not None:
            plain = torch.nn.functional.linear(x, weight, bias)
            # In place it is a pass less, but torch before 2.13 compiles that to gradients of zero.
            if torch.compiler.is_compiling():
                return torch.addmm(plain, h, a.T, alpha=scale)
            return plain.addmm_(h, a.T, alpha=scale)
        if base is None:
            base = bias
        if base is not None:
            return torch.addmm(base, h, a.T, alpha=scale)
        return (h @ a.T) * scale if scale != 1 else h @ a.T

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> Any:
        x, h, weight, a, b, *factors = ctx.saved_tensors
        halves = _pairs(factors)
        if a is None or torch.is_grad_enabled():
            a, b, _ = low_rank_form(halves, ctx.parameterization)
            a, b = a.to(x.dtype), b.to(x.dtype)
        if torch.is_grad_enabled():  # create_graph: h must depend on what it was made from
            h = x @ b
        need_x, need_base, need_weight, need_bias, *need_factors = ctx.needs_input_grad[3:]
        grad_h = (grad @ a) * ctx.scale if ctx.scale != 1 else grad @ a
        grad_x = None
        if need_x and weight is None:
            grad_x = grad_h @ b.T
        elif need_x:
            grad_x = (grad @ weight).addmm_(grad_h, b.T)
        grad_factors: list[Tensor | None] = [None] * len(factors)
        if any(need_factors):
            grad_a = (grad.T @ h).to(factors[0].dtype)
            grad_b = (x.T @ grad_h).to(factors[0].dtype)
            if ctx.scale != 1:
                grad_a = grad_a * ctx.scale
            own = get_parameterization(ctx.parameterization)
            grad_factors = own.factor_gradients(grad_a, grad_b, halves)
        return (
            None,
            None,
            None,
            grad_x,
            grad if need_base else None,
            grad.T @ x if need_weight else None,
            grad.sum(0) if need_bias else None,
            *grad_factors,
        )


def for_any_batch_size() -> bool:
    """Whether operations are recorded, for inputs of other sizes than this one's."""
    return torch.compiler.is_exporting() or _is_traced()


def _is_traced() -> bool:
    """Whether ``torch.jit.trace`` is at work."""
    return torch._C._get_tracing_state() is not None


def _is_transformed() -> bool:
    """Whether per-sample gradients, vmap, forward-mode AD or a trace ask for plain operations."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_traced()
    )


def _pairs(factors: Sequence[Tensor]) -> list[Half]:
    return [Half(factors[i], factors[i + 1]) for i in range(0, len(factors), 2)]
