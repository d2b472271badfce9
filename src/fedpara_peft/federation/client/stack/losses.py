"""The losses of a stack's clients, in one pass through the model, and their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap

from ....comm.state import State
from ...data.loss import LossFunction, read_loss
from ...errors import ArgumentsError
from ...precision import Precision
from .batches import joined
from .rows import Held, Rows, mappable_attention

#: Trained values of a client up to which stacking paid on the CPU it was measured on (on a GPU it
#: paid most, and was measured up to half of that) …
_MOST_VALUES = 20_000
#: … or up to this share of a frozen base of up to so many values.
_MOST_OF_FROZEN, _MOST_FROZEN = 0.25, 25_000_000


class Losses(Protocol):
    """A way to run many clients at once.

    Attributes:
        most_clients: of a stack; more gain nothing. None: any number.
    """

    most_clients: int | None

    def pays(self, own: int) -> bool:
        """Whether it is known to pay, where so many values train."""

    def __call__(self, stack: State, batches: Sequence[Any], rows: int) -> tuple[Tensor, Tensor]:
        """Fill the stack's gradients.

        Args:
            stack: the clients' tensors, ``(clients, …)`` each.
            batches: the clients'.
            rows: of each batch.

        Returns:
            The mean losses and of how many terms each is, ``(clients,)`` both.
        """


def losses_of(
    model: nn.Module, compute_loss: LossFunction, names: Iterable[str], precision: Precision
) -> Losses:
    """The way that suits a model: as one with a frozen base, or recurrent, its rows together.

    Args:
        model: in place.
        compute_loss: from the model and a batch to what :func:`~..data.loss.read_loss` reads.
        names: of what trains.
        precision: of the forward pass.
    """

    def compute(model: nn.Module, batch: Any) -> Any:
        with precision.autocast():
            return compute_loss(model, batch)

    frozen = any(not p.requires_grad for p in model.parameters())
    if frozen or _is_recurrent(model):
        return Together(model, compute, names)
    return Mapped(model, compute)


class Mapped:
    """The whole model, mapped over the clients: where all of it is a client's own."""

    most_clients: int | None = None

    def __init__(self, model: nn.Module, compute_loss: LossFunction) -> None:
        self._model, self._compute = model, compute_loss
        self._held = Held(model, self._loss)

    def pays(self, own: int) -> bool:
        """See :class:`Losses`."""
        of_transformers = hasattr(getattr(self._model, "config", None), "model_type")
        return own <= _MOST_VALUES and not of_transformers  # many of which cannot be mapped whole

    def __call__(self, stack: State, batches: Sequence[Any], rows: int) -> tuple[Tensor, Tensor]:
        """See :class:`Losses`."""

        def one(tensors: State, batch: Any) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = self._held.with_tensors(tensors, batch, rows)
            return found

        with mappable_attention():
            losses, terms = vmap(one)(stack, _apart(joined(batches), len(batches)))
        _backward(losses, stack)
        return losses.detach(), terms

    def _loss(self, batch: Any, rows: int) -> tuple[Tensor, Tensor]:
        found = read_loss(self._compute(self._model, batch))
        terms = rows if found.terms is None else found.terms
        return found.mean, torch.as_tensor(terms, dtype=torch.float32, device=found.mean.device)


class Together:
    """All clients' rows in one batch (:mod:`.rows`): where much of the model is everybody's."""

    most_clients: int | None = 16

    def __init__(self, model: nn.Module, compute_loss: LossFunction, names: Iterable[str]) -> None:
        self._model, self._compute = model, compute_loss
        self._rows = Rows(model, names)

    def pays(self, own: int) -> bool:
        """See :class:`Losses`."""
        if _is_recurrent(self._model):
            return False
        frozen = sum(p.numel() for p in self._model.parameters()) - own
        return own <= _MOST_VALUES or (own <= _MOST_OF_FROZEN * frozen and frozen <= _MOST_FROZEN)

    def __call__(self, stack: State, batches: Sequence[Any], rows: int) -> tuple[Tensor, Tensor]:
        """See :class:`Losses`."""
        clients = len(batches)
        batch = joined(batches)
        with self._rows.of(stack, clients, _length(batch) // clients) as reductions:
            with reductions:
                found = self._compute(self._model, batch)
            try:
                loss = read_loss(found, clients=clients)
            except ArgumentsError:
                raise RuntimeError(
                    "its loss is not a mean that every client has of its own"
                ) from None
            terms = loss.terms
            if terms is None:
                terms = loss.mean.new_full((clients,), rows)
            elif not isinstance(terms, Tensor) or terms.shape != (clients,):
                raise RuntimeError("the number of its loss's terms is not told by client")
            _backward(loss.mean, stack)
        return loss.mean.detach(), terms.to(loss.mean.device, torch.float32)


def _is_recurrent(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def _backward(losses: Tensor, stack: State) -> None:
    for tensor in stack.values():
        tensor.grad = None
    torch.autograd.backward(losses.sum(), inputs=list(stack.values()))


def _length(batch: Any) -> int:
    """Rows of a batch, which need not be as many as a collator was given."""
    if isinstance(batch, Mapping):
        return _length(next(iter(batch.values())))
    return _length(batch[0]) if isinstance(batch, tuple) else len(batch)


def _apart(batch: Any, clients: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: _apart(part, clients) for key, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_apart(part, clients) for part in batch)
    return batch.unflatten(0, (clients, -1))
