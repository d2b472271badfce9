"""The rows of many clients in one batch: a model runs once, and only what is a client's own parts.

    y = f(x; W₀, θ_c)      rows of client c, for all c at once

What all clients have in common (a frozen base, attention, activations) sees one batch of all their
rows, client after client, and costs what such a batch costs. A module that has a client's own
tensors takes its rows apart and is mapped over the clients; fused recurrent kernels, which cannot
be mapped, run client by client. What reduces the whole batch to a number (a mean loss, a count of
labels) gives a number for each client instead.

Nothing here knows the model. So a stack's gradients are compared with a client's own before any is
trusted, and a forward that branches on the batch's content is refused unless all clients agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ....comm.state import State
from .batches import OneByOneError

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_LOSSES = frozenset({
    F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss,
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
})  # fmt: skip
_ALONG: dict[str, Any] = {
    "mean": torch.mean, "sum": torch.sum, "all": torch.all, "any": torch.any,
    "max": torch.amax, "min": torch.amin,
}  # fmt: skip
#: Reductions of a whole tensor, by what does the same along a dimension.
_REDUCTIONS = {getattr(owner, n): f for n, f in _ALONG.items() for owner in (torch, Tensor)}
_NUMBERS = frozenset({
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item,
})  # fmt: skip
_ATTENTION = frozenset({F.scaled_dot_product_attention, F.multi_head_attention_forward})
#: What tells of a tensor's content in other ways.
_TOLD = frozenset({torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, Tensor.tolist})


class Rows:
    """A model that takes the rows of several clients in one batch.

    Args:
        model: in place.
        names: of what trains in it, as in ``named_parameters()``.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        wanted = set(names)
        first = {p: n for n, p in model.named_parameters() if n in wanted}
        places: dict[str, dict[str, str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in first:
                place = _called(model, name)
                places.setdefault(place, {})[name] = first[parameter]
        outermost = [
            place for place in places
            if not any(_is_under(place, other) for other in places if other != place)
        ]  # fmt: skip
        self._own = frozenset(map(id, first))
        self._owners = [
            _Owner(model.get_submodule(place), {
                name[len(place) :].lstrip("."): known
                for below, own in places.items() if _is_under(below, place)
                for name, known in own.items()
            })
            for place in outermost
        ]  # fmt: skip

    @contextmanager
    def of(self, stack: State, clients: int, rows: int) -> Iterator[Reductions]:
        """Let the model take ``clients · rows`` rows, with the tensors of ``stack``.

        Gradients must be found within. Yields what tells the clients' numbers apart; it is to be
        entered around the forward pass.
        """
        reductions = Reductions(clients, rows, self._own)
        try:
            for owner in self._owners:
                owner.enter(stack, reductions)
            yield reductions
        finally:
            for owner in self._owners:
                owner.leave()


class Reductions(TorchFunctionMode):
    """While entered, what reduces all rows to a number gives ``(clients,)`` numbers instead.

    Args:
        clients: how many.
        rows: of each.
        own: the model's parameters in whose place the clients have their own, by ``id``.
    """

    def __init__(self, clients: int, rows: int, own: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.clients, self.rows, self._own = clients, rows, own
        #: Whether a client's own module runs, mapped over the clients.
        self.mapped = False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.mapped:
            if func in _ATTENTION:
                with mappable_attention():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        if self._has_own(args) or self._has_own(kwargs.values()):
            return self._told_of_own(func, args, kwargs)
        if func in _LOSSES:
            return self._loss(func, *args, **kwargs)
        if func in _REDUCTIONS and len(args) == 1 and not {"dim", "axis"} & kwargs.keys():
            return self._reduced(func, args[0], kwargs)
        if func in _TOLD or func in _NUMBERS:
            return self._agreed(func, *args, **kwargs)
        return func(*args, **kwargs)

    def is_whole(self, tensor: Tensor, dim: int = 0) -> bool:
        """Whether a tensor has all clients' rows along a dimension."""
        size = tensor.shape[dim] if tensor.dim() > dim else 0
        return size > 0 and size % (self.clients * self.rows) == 0

    def apart(self, tensor: Tensor) -> Tensor:
        """``(clients, rows, …)`` from ``(clients · rows, …)``."""
        return tensor.reshape(self.clients, -1, *tensor.shape[1:])

    def _has_own(self, values: Iterable[Any]) -> bool:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self._own:
                    return True
            elif isinstance(value, tuple | list) and self._has_own(value):
                return True
        return False

    def _told_of_own(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of a parameter in whose place clients have their own: its size or dtype, no value."""
        found = func(*args, **kwargs)
        values = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(found))
        if values or func in _TOLD or func in _NUMBERS:
            raise RuntimeError(
                "its loss, or its forward, uses a trained parameter outside of the module that "
                "has it, where it is no client's"
            )
        return found

    def _loss(self, func: Any, inputs: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("reduction", "mean") == "none" or not self.is_whole(inputs):
            return func(inputs, target, *args, **kwargs)

        def one(inputs: Tensor, target: Tensor) -> Tensor:
            found: Tensor = func(inputs, target, *args, **kwargs)
            return found

        return vmap(one)(self.apart(inputs), self.apart(target))

    def _reduced(self, func: Any, tensor: Tensor, kwargs: Mapping[str, Any]) -> Any:
        if not self.is_whole(tensor):
            return func(tensor, **kwargs)
        return _REDUCTIONS[func](tensor.reshape(self.clients, -1), dim=1, **kwargs)

    def _agreed(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A number that Python asks for, where it is the same for all clients."""
        if func in _NUMBERS and tensor.shape == (self.clients,):
            if bool(tensor.eq(tensor[0]).all()):
                return func(tensor[0], *args, **kwargs)
            raise OneByOneError
        raise RuntimeError("its forward asks for the content of a tensor of the whole batch")


class _Owner:
    """A module with tensors of a client's own."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self._module, self._names = module, names
        self._held = Held(module, self._unpatched)
        self._before: Any = None
        recurrent = next((m for m in module.modules() if isinstance(m, nn.RNNBase)), None)
        self._run = _mapped
        if recurrent is not None:
            self._run = functools.partial(_one_by_one, dim=0 if recurrent.batch_first else 1)

    def enter(self, stack: State, reductions: Reductions) -> None:
        self._before = vars(self._module).get("forward")
        self._forward = self._module.forward
        own = {name: stack[known] for name, known in self._names.items() if known in stack}

        def forward(*args: Any, **kwargs: Any) -> Any:
            before, reductions.mapped = reductions.mapped, True
            try:
                return self._run(self._held, own, reductions, args, kwargs)
            finally:
                reductions.mapped = before

        self._module.forward = forward

    def leave(self) -> None:
        if self._before is not None:
            self._module.forward = self._before
        else:
            vars(self._module).pop("forward", None)

    def _unpatched(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class Held(nn.Module):
    """A module and what is done with it, so that its tensors can be exchanged meanwhile.

    Args:
        module: in place.
        call: what is done; it may be the module's own forward.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self._call = module, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do it."""
        return self._call(*args, **kwargs)

    def with_tensors(self, tensors: State, *args: Any, **kwargs: Any) -> Any:
        """Do it while the module has these, by their names in it."""
        named = {f"module.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self, named, args, kwargs)


def mappable_attention() -> AbstractContextManager[None]:
    """Attention in plain products: the fused kernels would be called client by client."""
    found: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return found


def _mapped(held: Held, own: State, rows: Reductions, args: Any, kwargs: Any) -> Any:
    """Run a module with every client's tensors on its rows."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    whole = [isinstance(leaf, Tensor) and rows.is_whole(leaf) for leaf in leaves]
    if not any(whole):
        raise RuntimeError("a module with trained parameters is called on what is no client's")
    leaves = [rows.apart(t) if w else t for t, w in zip(leaves, whole, strict=True)]

    shape: list[Any] = []

    def one(own: State, leaves: list[Any]) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        found, kind = pytree.tree_flatten(held.with_tensors(own, *args, **kwargs))
        shape[:] = kind, [Tensor if isinstance(leaf, Tensor) else leaf for leaf in found]
        return [leaf for leaf in found if isinstance(leaf, Tensor)]

    found = vmap(one, in_dims=(0, [0 if w else None for w in whole]))(own, leaves)
    tensors = (t.flatten(0, 1) if t.dim() > 1 else t for t in found)
    kind, parts = shape
    return pytree.tree_unflatten([next(tensors) if p is Tensor else p for p in parts], kind)


def _one_by_one(
    held: Held, own: State, rows: Reductions, args: Any, kwargs: Any, *, dim: int
) -> Any:
    """Run a recurrent module client by client.

    Sequences have their rows along ``dim``, states ``(layers, rows, …)`` along 1.
    """
    (sequence, *rest), clients = args, rows.clients
    if not isinstance(sequence, Tensor) or sequence.dim() != 3 or not rows.is_whole(sequence, dim):
        raise RuntimeError("a recurrent module is called on something else than padded sequences")
    parts = sequence.chunk(clients, dim)
    leaves, spec = pytree.tree_flatten((rest, kwargs))
    split = [t.chunk(clients, 1) if isinstance(t, Tensor) else [t] * clients for t in leaves]
    found = []
    for i, part in enumerate(parts):
        others, named = pytree.tree_unflatten([s[i] for s in split], spec)
        mine = {n: t[i] for n, t in own.items()}
        found.append(held.with_tensors(mine, part, *others, **named))
    outputs, states = zip(*found, strict=True)
    return torch.cat(outputs, dim), pytree.tree_map(lambda *s: torch.cat(s, 1), *states)


def _called(model: nn.Module, name: str) -> str:
    """The innermost module around a parameter that is called, not only held."""
    place = name.rpartition(".")[0]
    while place and isinstance(model.get_submodule(place), _CONTAINERS):
        place = place.rpartition(".")[0]
    return place


def _is_under(place: str, other: str) -> bool:
    return place == other or not other or place.startswith(other + ".")
