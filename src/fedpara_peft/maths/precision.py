"""In which dtype things are computed, under autocast and beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

#: Kinds of devices that have no float64; those of Apple.
WITHOUT_FLOAT64 = {"mps"}


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast brings products to on a device, None where it is off."""
    kind = device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(kind: str) -> bool:
    """Whether a device knows autocast; asked for, not traced, which torch before 2.13 cannot."""
    return torch.amp.is_autocast_available(kind)


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products run in the dtype of their operands, whatever autocast says."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def wide(x: Tensor) -> Tensor:
    """X in float64, on the CPU where its device has none."""
    return (x.cpu() if x.device.type in WITHOUT_FLOAT64 else x).double()


def as_real(x: Tensor) -> Tensor:
    """X itself, or of complex numbers both parts, in a last dimension of 2."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def from_real(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`as_real`, in the dtype and on the device of a tensor."""
    found = x.to(like.dtype.to_real())
    return (torch.view_as_complex(found) if like.is_complex() else found).to(like.device)


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a plain layer's product with x: autocast's, else x's.

    Autocast leaves float64 alone.
    """
    wanted = autocast_dtype(x.device)
    return x.dtype if wanted is None or x.dtype == torch.float64 else wanted


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the low-rank form meets x: the output's, but float32 for float16.

    bfloat16 has float32's range. float16 has not, and ``x B`` may leave it.
    """
    dtype = output_dtype(x)
    return torch.float32 if dtype == torch.float16 else dtype
