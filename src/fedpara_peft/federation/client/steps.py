"""A client's local steps, written once: of one client in the model, or of a stack's side by side.

    init    a new optimizer, with what the client kept of its last; the strategy's correction
    step    correct the gradients, clip them, move the parameters
    final   the mean loss, how it trained, what it keeps of the optimizer

The engines differ in how they find the gradients, and in nothing else. A stack's tensors are
``(clients, …)``, and the arithmetic is that of one client, entry by entry.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...comm.state import State
from ...maths.precision import as_real
from ..arguments import FederatedArguments
from ..errors import ArgumentsError, ClientDataError
from ..strategies import Correction, LocalSteps
from .optimizer import Optimizers
from .optimizer_state import Kept, kept_of, options_of, put_back, stacked, unstacked
from .sgd import step_of
from .step_weights import StepWeights, clip_scale

T = TypeVar("T")


@dataclass(frozen=True)
class Stepped:
    """A client's steps, when they are over.

    Attributes:
        loss: mean over all terms of its batches.
        steps: how it trained.
        stuck: whether every gradient was clipped to nothing.
        kept: what it keeps of its optimizer.
        terms: of its batches, together: rows, or tokens that count; None: unknown.
    """

    loss: float
    steps: LocalSteps
    stuck: bool
    kept: Kept
    terms: float | None


class Steps:
    """See the module.

    Args:
        optimizers: makes the optimizer.
        args: the run's settings.
        round: rounds completed, for the learning rate.
        parameters: what trains, live leaves of autograd with their gradients in ``grad``.
        start: the broadcast's part of it, from which strategies pull and push.
        corrections: what the strategy adds, one a client.
        kept: what the clients kept of their optimizers.
        stack: how many clients the tensors are of, in their first dimension; None: one, without.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        args: FederatedArguments,
        round: int,
        parameters: Mapping[str, Tensor],
        start: State,
        corrections: Sequence[Correction | None],
        kept: Sequence[Kept],
        stack: int | None = None,
    ) -> None:
        self.rate = args.learning_rate_at(round)
        self._args, self._stack, self._parameters = args, stack, parameters
        self._can_pause = optimizers.can_pause
        self._keeps = args.optimizer_state == "keep"
        # A velocity that is kept is of earlier rounds' gradients.
        self._sums = optimizers.sums_gradients and not (self._keeps and optimizers.momentum)
        self._names = {tensor: name for name, tensor in parameters.items()}
        self._optimizers = optimizers.make(parameters, round)
        put_back(self._optimizers, self._names, kept[0] if stack is None else stacked(kept))
        self._options = options_of(self._optimizers) if self._keeps else []
        self._moves = [step_of(optimizer) for optimizer in self._optimizers]
        self._pull = corrections[0].pull if corrections[0] else 0.0
        moved = [(p, n) for n, p in parameters.items() if n in start]
        self._pulled = [(p, start[n]) for p, n in moved] if self._pull else []
        offsets = [(c.offset if c else None) or {} for c in corrections]
        offset = {p: _joined(offsets, n, p, stack) for p, n in moved}
        self._offset = [(p, fixed) for p, fixed in offset.items() if fixed is not None]
        self._weights = StepWeights(optimizers.momentum)
        self._count: Tensor | int = 0
        self._found: list[tuple[Tensor, Tensor | float]] = []

    def step(
        self, losses: Sequence[tuple[Tensor, Tensor | float]], made: Tensor | None = None
    ) -> None:
        """Make a step with the gradients that the parameters have.

        A parameter that the loss did not reach stays where it is, unless the strategy's term of the
        objective depends on it: then its gradient is 0, and is corrected as any other.

        Args:
            losses: the mean losses that the gradients are of, and of how many terms each is.
            made: which clients of the stack make this step; None: all.

        Raises:
            CannotPauseError: not all make it, and with this optimizer that cannot be undone.
        """
        if made is not None and not self._can_pause:
            raise CannotPauseError
        self._found += losses
        self._count = self._count + (1 if made is None else made.long())
        with torch.no_grad():
            for parameter, fixed in self._pulled:
                _gradient(parameter).add_(parameter - fixed, alpha=self._pull)
            for parameter, fixed in self._offset:
                _gradient(parameter).add_(fixed)
            self._weights.step(1.0 if self._args.max_grad_norm is None else self._clip(), made)
            if made is None:
                for move in self._moves:
                    move()
            else:
                self._move_some(made)

    def final(self) -> list[Stepped]:
        """What became of every client.

        Raises:
            ClientDataError: a client had nothing to learn from.
            ArgumentsError: the optimizer's state cannot be kept.
        """
        if not self._found:
            raise nothing_counts()
        clients = 1 if self._stack is None else self._stack
        losses = torch.stack([loss for loss, _ in self._found]).cpu().double()
        terms = _as_double([count for _, count in self._found])
        totals = terms.sum(0)
        if not bool(totals.all()):
            raise nothing_counts()
        means = (torch.linalg.vecdot(losses, terms, dim=0) / totals).expand(clients).tolist()
        counts = torch.as_tensor(self._count).expand(clients).tolist()
        seen = totals.expand(clients).tolist()
        weights = _as_double([self._weights.total])[0].expand(clients).tolist()
        kept = self._kept()
        return [
            Stepped(
                mean, LocalSteps(count, self.rate, weight if self._sums else None), weight == 0,
                kept if self._stack is None else unstacked(kept, client), total,
            )
            for client, (mean, count, weight, total) in enumerate(
                zip(means, counts, weights, seen, strict=True)
            )
        ]  # fmt: skip

    def _clip(self) -> Tensor | float:
        """Clip every client's gradients to ``max_grad_norm``; what they were scaled by."""
        bound = self._args.max_grad_norm
        found = [p.grad for p in self._parameters.values() if p.grad is not None]
        if bound is None or not found:
            return 1.0
        if self._stack is None:  # as clip_grad_norm_ does, whose scale is needed here as well
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
            scale = clip_scale(norm, bound)
            torch._foreach_mul_(found, scale)
            return scale
        squares = [as_real(g).reshape(len(g), -1).square().sum(1) for g in found]
        scale = clip_scale(functools.reduce(torch.add, squares).sqrt(), bound)
        for grad in found:
            grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)))
        return scale

    def _move_some(self, made: Tensor) -> None:
        """Make the step, and take it back for the clients of a stack that rest."""
        resting = ~made
        before = {p: p.clone() for p in self._parameters.values()}
        kept = {
            part: {n: t.clone() for n, t in state.items()}
            for part, state in kept_of(self._optimizers, self._names).items()
        }
        for move in self._moves:
            move()
        for tensor, old in before.items():
            tensor[resting] = old[resting]
        for part, state in kept_of(self._optimizers, self._names).items():
            for name, tensor in state.items():
                was = kept.get(part, {}).get(name)
                tensor[resting] = 0 if was is None else was[resting]

    def _kept(self) -> dict[str, State]:
        if not self._keeps:
            return {}
        if options_of(self._optimizers) != self._options:
            raise ArgumentsError(
                f"optimizer_state='keep' keeps what belongs to a parameter, and "
                f"{type(self._optimizers[0]).__name__} changes its groups' options as it goes: use "
                "optimizer_state='reset'"
            )
        found = kept_of(self._optimizers, self._names)
        # An optimizer may hold a tensor twice, or one of the model's.
        return {part: {n: t.clone() for n, t in state.items()} for part, state in found.items()}


def in_a_round(epoch: Callable[[int], Iterable[T]], args: FederatedArguments) -> Iterator[T]:
    """What a client's local steps of a round are made from, one after the other.

    Args:
        epoch: the same of an epoch, by its number; a short one goes on with the next.
        args: how many epochs, or how many steps. A step counts, too, if no label of it does.
    """
    most = args.per_client_max_steps
    made = 0
    for number in itertools.count() if most > 0 else range(args.num_local_epochs):
        before = made
        for found in epoch(number):
            yield found
            made += 1
            if made == most:
                return
        if made == before:  # no rows: there is nothing to go on with
            return


def told_terms(stepped: Stepped, args: FederatedArguments) -> float | None:
    """What the server is told of a client's terms; None where clients do not weigh so much.

    Raises:
        ArgumentsError: nobody knows them.
    """
    if args.client_weighting != "tokens":
        return None
    if stepped.terms is None:
        raise ArgumentsError(
            "client_weighting='tokens', but local_trainer does not say on how many tokens it "
            "trained: let it be a transformers Trainer, or use 'examples'"
        )
    return float(stepped.terms)


class CannotPauseError(Exception):
    """Clients of a stack make different steps, and the optimizer cannot leave any out."""


def nothing_counts() -> ClientDataError:
    """A client whose labels are all ignored."""
    return ClientDataError(
        "no label counts (all are -100), so there is nothing to learn from: leave the client out"
    )


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _joined(
    offsets: Sequence[State], name: str, parameter: Tensor, stack: int | None
) -> Tensor | None:
    """The clients' offsets of a parameter, 0 where a client has none; None if nobody has one."""
    if not any(name in offset for offset in offsets):
        return None
    if stack is None:
        return offsets[0][name]
    none = torch.zeros_like(parameter[0])
    return torch.stack([offset.get(name, none) for offset in offsets])


def _as_double(terms: Sequence[Tensor | float]) -> Tensor:
    """Numbers of terms, one a batch or a row of clients a batch."""
    if isinstance(terms[0], Tensor):
        return torch.stack([torch.as_tensor(t) for t in terms]).cpu().double()
    return torch.tensor(terms, dtype=torch.float64)
