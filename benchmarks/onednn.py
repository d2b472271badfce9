"""oneDNN's matrix product on a CPU, which the package does not use; see ablations.py.

PyTorch gives a float32 ``a @ b`` to MKL, which has no AVX-512 kernels for other makers' CPUs, and
its convolutions to oneDNN, which has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fedpara_peft.maths.precision import as_given, autocast_dtype

# oneDNN's ``a @ wᵀ`` on plain tensors; private to PyTorch, hence found or not.
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

#: Multiplications below which calling oneDNN costs more than it gains.
LEAST_WORK = 1 << 21


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, in oneDNN where that is faster. Differentiable twice.

    Args:
        a: ``(m, k)``.
        b: ``(k, n)``.

    Returns:
        ``(m, n)``, contiguous.
    """
    if a.shape[0] * a.shape[1] * b.shape[1] < LEAST_WORK or not in_onednn(a, b):
        return a @ b
    result: Tensor = _Matmul.apply(a, b)  # type: ignore[no-untyped-call]
    return result


def in_onednn(a: Tensor, b: Tensor) -> bool:
    """Plain float32 CPU tensors that nothing traces, transforms or casts."""
    return (
        _LINEAR is not None
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in (a, b))
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch._C._get_mkldnn_enabled()
        and autocast_dtype(a.device) is None
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _Matmul(torch.autograd.Function):
    """The operation has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        result: Tensor = _LINEAR(a, b.T, None, "none", [], "")
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        with as_given(grad.device):  # backward() may be called under autocast
            return matmul(grad, b.T) if need_a else None, matmul(a.T, grad) if need_b else None
