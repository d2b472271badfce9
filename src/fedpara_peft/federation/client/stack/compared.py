"""A stack's gradients beside those that its clients have alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ....comm.state import State
from ....maths.precision import as_real, wide
from ...data.loss import LossFunction, read_loss
from ...precision import Precision
from ..local import LocalTrainer
from .losses import losses_of

#: Relative difference of gradients that rounding does not explain, on the CPU and on accelerators,
#: which may round products of float32 to TF32 …
_DISAGREE, _DISAGREE_ROUNDED = 1e-3, 1e-2
#: … where a tensor's are not smaller than this share of all: then they may be what cancelled out.
_CANCELLED = 1e-3
#: Steps of the first batches that are compared.
_FIRST_STEPS = 2


class Compared:
    """The losses of a stack's clients; its gradients are not taken on trust.

    They are compared, in full precision, with those of single clients: in the first steps of
    clients at both ends, as a model may look at its batch's first row, or its last, and twice, as
    what pulls to the start begins at nothing; and of one client with every new shape of the batch,
    as only a tensor's size tells whether it has the clients' rows or is everybody's (a mask,
    positions).

    Args:
        local: the sequential engine; its model's parameters are overwritten to compare.
        compute_loss: from the model and a batch to what :func:`~..data.loss.read_loss` reads.
        precision: of the forward pass.
    """

    def __init__(
        self, local: LocalTrainer, compute_loss: LossFunction, precision: Precision
    ) -> None:
        self._model, self._parameters = local.model, local.parameters
        self._compute = compute_loss
        self._losses = losses_of(local.model, compute_loss, local.parameters, precision)
        full = Precision("no", precision.device_type)
        self._exact = self._losses
        if not precision.is_full:
            self._exact = losses_of(local.model, compute_loss, local.parameters, full)
        self._seen: Counter[Any] = Counter()
        self._at: tuple[State, Sequence[Any]] | None = None
        self.most_clients = self._losses.most_clients

    def pays(self, own: int) -> bool:
        """See :class:`~.losses.Losses`."""
        return self._losses.pays(own)

    def __call__(self, stack: State, batches: Sequence[Any], rows: int) -> tuple[Tensor, Tensor]:
        """See :class:`~.losses.Losses`.

        Raises:
            RuntimeError: the stack has other gradients than its clients alone, or whatever the
                model raises when it is run stacked.
        """
        shapes = [tuple(t.shape) for t in pytree.tree_leaves(batches[0]) if isinstance(t, Tensor)]
        like = (len(batches), rows, *shapes)
        first = self._seen.total() < _FIRST_STEPS
        due = first or not self._seen[like]
        self._at = stack, batches
        if due and self._exact is not self._losses:
            _, counts = self._exact(stack, batches, rows)
            self._compare(stack, batches, counts, like, first)
        found = self._losses(stack, batches, rows)
        if due and self._exact is self._losses:
            self._compare(stack, batches, found[1], like, first)
        self._at = None
        return found

    def fails_alone(self) -> bool:
        """Whether a step that failed does so for a client by itself: because of its data."""
        if self._at is None:
            return False
        (stack, batches), self._at = self._at, None
        for client, batch in enumerate(batches):
            self._hold(stack, client)
            try:
                with torch.no_grad():
                    self._compute(self._model, batch)
            except Exception:  # which comes again, and is then said of its client
                return True
        return False

    def _compare(
        self, stack: State, batches: Sequence[Any], counts: Tensor, like: Any, first: bool
    ) -> None:
        learns, compared = counts.cpu().gt(0).nonzero().flatten().tolist(), False
        for client in {*learns[:1], *learns[-1:]} if first else learns[-1:]:
            self._hold(stack, client)
            loss = read_loss(self._compute(self._model, batches[client])).mean
            if not bool(loss.isfinite()):
                continue
            trained = {n: p for n, p in self._parameters.items() if p.requires_grad}
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            alone = {n: g for n, g in zip(trained, found, strict=True) if g is not None}
            _require_equal(
                alone, {n: t.grad[client] for n, t in stack.items() if t.grad is not None}
            )
            compared = True
        self._seen[like] += compared

    def _hold(self, stack: State, client: int) -> None:
        with torch.no_grad():
            for name, tensor in stack.items():
                self._parameters[name].copy_(tensor[client])


def _require_equal(alone: State, stacked: State) -> None:
    if alone.keys() != stacked.keys():
        names = sorted(alone.keys() ^ stacked.keys())
        raise RuntimeError(f"stacked clients train other parameters, {names[:3]}")
    sizes = {n: _norm(g) for n, g in alone.items()}
    least = _CANCELLED * sum(size**2 for size in sizes.values()) ** 0.5
    for name, grad in alone.items():
        most = _DISAGREE if grad.device.type == "cpu" else _DISAGREE_ROUNDED
        share = _norm(stacked[name] - grad) / (max(sizes[name], least) or 1.0)
        if not share <= most:  # nor is NaN
            raise RuntimeError(f"gradients of {name} differ by {share:.0%} from those alone")


def _norm(tensor: Tensor) -> float:
    return float(wide(as_real(tensor)).norm())
