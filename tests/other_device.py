"""A device that is not there: it computes on the CPU and is as strict as a real one.

Tensors of another device cannot be mixed with the CPU's (as on any accelerator), nor be of float64
(as on Apple's). Under :func:`other_device` a program runs as it would there, so far as it can tell.
"""

import contextlib

import accelerate
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from fedpara_peft.maths import precision

#: One that torch knows by name and that no build has.
DEVICE = torch.device("lazy")
#: What may be given tensors of both devices: it brings them from the one to the other.
_TRANSFERS = {"_to_copy", "copy_", "_foreach_copy_", "_copy_from", "_copy_from_and_resize"}


class Elsewhere(torch.Tensor):
    """A tensor of that device; its values rest on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def __repr__(self, *, tensor_contents=None):
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees what makes tensors of none, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    """An operation as the device does it."""
    name = function._schema.name.partition("::")[2]
    given, _ = tree_flatten((args, kwargs))
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, Elsewhere)]
    plain = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
    if here and plain and name not in _TRANSFERS:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found {DEVICE} and cpu"
        )
    asked = kwargs.get("device")
    there = bool(here) if asked is None else torch.device(asked).type == DEVICE.type
    if name == "copy_":
        there = isinstance(args[0], Elsewhere)
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a {DEVICE} generator, but found one of the cpu")
    changes = {} if asked is None or torch.device(asked).type != DEVICE.type else {"device": "cpu"}
    found = function(*tree_map(_held, args), **{**tree_map(_held, kwargs), **changes})
    if not there:
        return found
    results = [t for t in tree_flatten(found)[0] if isinstance(t, torch.Tensor)]
    if any(t.dtype is torch.float64 for t in results):
        raise TypeError(f"{name}: cannot make a tensor of float64 on {DEVICE}: it has none")
    made = tree_map(lambda t: Elsewhere(t) if isinstance(t, torch.Tensor) else t, found)
    return return_and_correct_aliasing(function, args, kwargs, made) if here else made


def _held(value):
    return value.held if isinstance(value, Elsewhere) else value


@contextlib.contextmanager
def other_device():
    """Accelerate finds it, and all operations can name it."""
    with pytest.MonkeyPatch.context() as patch, _Everywhere():
        patch.setattr(accelerate.Accelerator, "device", DEVICE)
        patch.setattr(precision, "WITHOUT_FLOAT64", {DEVICE.type})
        yield
