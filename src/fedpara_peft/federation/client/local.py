"""A client's local training."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ...comm.errors import PayloadError
from ...comm.state import State, communicated_state, local_state
from ...tuner.jacobian import composed_weights, jacobian_correction
from ...tuner.scope import persistent_buffers
from ..arguments import FederatedArguments
from ..data.batches import Collator, LastBatch, batches, count_rows
from ..data.loss import Loss, LossFunction, read_loss
from ..errors import ArgumentsError, ClientDataError, about
from ..precision import Precision
from ..random import derived_seed, seeded, torch_generator
from ..state import Broadcast, ClientState, ClientUpdate
from ..strategies import Correction, LocalSteps, Objective, Strategy
from .sgd import SGD, Corrector
from .step_weights import StepWeights, clip_scale

logger = logging.getLogger(__name__)

_FIRST_LOSS_SCALE = 2.0**16
_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Turn:
    """A client about to train.

    Attributes:
        client: client index.
        round: rounds completed.
        seen: the part of the broadcast that trains in this round.
        kept: what the strategy keeps for the client.
        residual: what its codec has lost so far.
        correction: what the strategy adds to its gradients.
    """

    client: int
    round: int
    seen: Broadcast
    kept: Mapping[str, State]
    residual: State
    correction: Correction | None


@dataclass(frozen=True)
class Trained:
    """A client that has trained and not yet sent anything.

    Attributes:
        turn: what it trained from.
        update: what it has to send.
        steps: how it trained.
        local: its tensors of local scope.
    """

    turn: Turn
    update: ClientUpdate
    steps: LocalSteps
    local: State

    @property
    def active(self) -> dict[str, State]:
        """What the strategy keeps for the client, of the parameters that trained."""
        return {group: _only(s, self.update.update) for group, s in self.turn.kept.items()}


class LocalTrainer:
    """Trains clients one after the other in one model, which is never rebuilt.

    Args:
        model: on its device; its tensors are overwritten for every client.
        args: the run's settings.
        accelerator: device and mixed precision.
        strategy: the federated optimizer.
        compute_loss: from the model and a batch to what :func:`~..data.loss.read_loss` reads.
        collator: makes a batch from rows.
        names: the clients' names, for messages; their indices by default.

    Attributes:
        shared: the communicated tensors, live.
        local: the tensors of local scope, live.
        buffers: names in ``shared`` that are buffers.
        first_local: the local tensors of a client that never trained.
        parameters: the trainable parameters, live.
        objective: what clients minimize.

    Raises:
        ArgumentsError: the model has no trainable parameters, or none of the needed scope.
    """

    def __init__(
        self,
        model: nn.Module,
        args: FederatedArguments,
        accelerator: Accelerator,
        strategy: Strategy,
        compute_loss: LossFunction,
        collator: Collator | None = None,
        names: Sequence[Any] | None = None,
    ) -> None:
        self.model = model
        self._args = args
        self._accelerator = accelerator
        self._strategy = strategy
        self.objective = Objective(strategy, compute_loss)
        self.collator = collator
        self._names = names
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ArgumentsError(
                "the model has no trainable parameters: load adapters with is_trainable=True"
            )
        self.shared = communicated_state(model, args.local_modules)
        self.local = local_state(model, args.local_modules)
        if not strategy.communicates:
            self.shared, self.local = {}, {**self.shared, **self.local}
        elif not self.shared:
            raise ArgumentsError(
                "all of the model is local, nothing would be communicated: name fewer "
                "local_modules, or use strategy=LocalOnly()"
            )
        buffers = _buffers(model)
        self.buffers = frozenset(buffers) & self.shared.keys()
        self._tell_of_batch_norm()
        self.first_local = _clone(self.local)
        # Buffers of a frozen base (batch-norm statistics) start afresh for every client.
        self._resting = [t for n, t in buffers.items() if n not in {**self.shared, **self.local}]
        self._first_resting = [t.clone() for t in self._resting]
        self._precision = Precision.of(args.mixed_precision, accelerator)
        # fp16's loss scale is found anew by every client, so that no client depends on another.
        self._scales_loss = self._precision.scales_loss

    def load(self, params: State, state: ClientState | None = None) -> None:
        """Put a global state and a client's own into the model; a new client's by default."""
        local = self.first_local if state is None else state.local
        with torch.no_grad():
            _copy(list(self.shared.values()), [params[n] for n in self.shared])
            _copy(list(self.local.values()), [local[n] for n in self.local])
            _copy(self._resting, self._first_resting)

    def name(self, client: int) -> Any:
        """A client's name, for messages."""
        return client if self._names is None else self._names[client]

    def last_batch(self) -> LastBatch:
        """What becomes of a last batch that is not full, with the model in training mode."""
        if self._args.drop_last:
            return "drop"
        normalizes = any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules())
        return "merge" if normalizes else "keep"

    def rest(self, names: Collection[str]) -> None:
        """Train everything but these parameters from now on."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name not in names)

    def train(
        self,
        client: int,
        dataset: Any,
        round: int,
        broadcast: Broadcast,
        state: ClientState | None = None,
        resting: Collection[str] = (),
    ) -> Trained:
        """Train a client: E epochs of SGD from the broadcast, Sec. 3 of arXiv:2108.06098.

        Args:
            client: client index, for the derived randomness.
            dataset: the client's examples.
            round: rounds completed, for the learning rate and the derived randomness.
            broadcast: what the client received.
            state: what it kept from its last round.
            resting: names that do not train this round (see :meth:`rest`) and are not sent.

        Returns:
            What it has to send, and what it may keep; see :func:`~.turn.deliver`.

        Raises:
            PayloadError: the loss is not finite, so there is nothing to send.
            ClientDataError: the data cannot be trained on; the message names the client.
        """
        turn = self.begin(client, round, broadcast, state, resting)
        self.load(broadcast.params, state)
        self.objective.begin(turn.seen, turn.kept)
        with about(self.name(client)):
            examples = count_rows(dataset)
            loss, steps = self._steps(turn, dataset)
        here = {n: self.shared[n] for n in turn.seen.params}
        return self.end(turn, examples, loss, steps, here, _clone(self.local))

    def begin(
        self,
        client: int,
        round: int,
        broadcast: Broadcast,
        state: ClientState | None,
        resting: Collection[str],
    ) -> Turn:
        """What a client trains from; arguments as in :meth:`train`."""
        kept = {} if state is None else self._placed(state.strategy)
        active = [n for n in self.shared if n not in resting]
        seen = Broadcast(_only(broadcast.params, active), broadcast.extra)
        correction = self._strategy.correction(seen, kept)
        return Turn(client, round, seen, kept, {} if state is None else state.residual, correction)

    def end(
        self,
        turn: Turn,
        num_examples: int,
        loss: float,
        steps: LocalSteps,
        shared: State,
        local: State,
    ) -> Trained:
        """What a client has to send, from the tensors it ended with.

        Raises:
            PayloadError: it diverged, so there is nothing to send.
        """
        if not math.isfinite(loss) or steps.weight == 0:  # every gradient was clipped to nothing
            raise PayloadError(
                "diverged",
                f"it diverged in round {turn.round + 1} (loss {loss}): lower learning_rate (now "
                f"{steps.learning_rate:.3g}) or set max_grad_norm",
            )
        start = turn.seen.params
        names = [n for n in start if n not in self.buffers]
        change = _difference([shared[n] for n in names], [start[n] for n in names])
        update = dict(zip(names, change, strict=True))
        buffers = {n: shared[n].clone() for n in start if n in self.buffers}
        told = steps if self._strategy.sees_updates else None
        sent = ClientUpdate(turn.client, num_examples, update, loss, {}, buffers, told)
        trained = Trained(turn, sent, steps, local)
        extra = self._strategy.client_extra(turn.seen, trained.active, update, steps)
        return replace(trained, update=replace(sent, extra=extra))

    def _placed(self, kept: Mapping[str, State]) -> dict[str, State]:
        """What a client keeps, where its tensors train."""
        return {
            group: {name: tensor.to(self.shared[name].device) for name, tensor in state.items()}
            for group, state in kept.items()
        }

    def _steps(self, turn: Turn, dataset: Any) -> tuple[float, LocalSteps]:
        args, round, client = self._args, turn.round, turn.client
        rate = args.learning_rate_at(round)
        trained = {n: p for n, p in self.parameters.items() if n in turn.seen.params}
        correct = Corrector(turn.correction, trained, turn.seen.params)
        optimizer = SGD(list(self.parameters.values()), rate, args.momentum, args.weight_decay)
        self._loss_scale = _FIRST_LOSS_SCALE if self._scales_loss else 1.0
        self.model.train()
        found: list[tuple[Tensor, float]] = []
        steps = 0
        weights = StepWeights(args.momentum)
        # Dropout, transforms and collators draw from the global generators.
        seed = derived_seed(args.seed, round, client, "training")
        with seeded(seed, self._accelerator.device), one_row_said():
            for epoch in range(args.num_local_epochs):
                order = torch_generator(args.seed, round, client, f"batches {epoch}")
                for window in self._windows(dataset, order):
                    losses = self._gradients(window, rate)
                    if not losses:
                        continue
                    correct()
                    scale: Tensor | float = 1.0
                    if args.max_grad_norm is not None:
                        norm = nn.utils.clip_grad_norm_(
                            self.parameters.values(), args.max_grad_norm
                        )
                        scale = clip_scale(norm, args.max_grad_norm)
                    weights.step(scale)
                    optimizer.step()
                    found += losses
                    steps += 1
        if not found:
            raise nothing_counts()
        terms = torch.tensor([count for _, count in found], dtype=torch.float64)
        mean = torch.stack([loss for loss, _ in found]).cpu().double() @ terms / terms.sum()
        return float(mean), LocalSteps(steps, rate, float(weights.total))

    def _windows(self, dataset: Any, order: torch.Generator) -> Iterator[list[tuple[Any, int]]]:
        """The batches of every local step, and of how many rows each is."""
        args, device = self._args, self._accelerator.device
        size = args.per_client_batch_size
        rows = batches(dataset, size, self.collator, order, self.last_batch())
        while window := list(itertools.islice(rows, args.gradient_accumulation_steps)):
            if device.type == "cpu":
                yield window
            else:
                yield [(send_to_device(batch, device), count) for batch, count in window]

    def _gradients(self, window: list[tuple[Any, int]], rate: float) -> list[tuple[Tensor, float]]:
        """Gradients of the mean loss over a step's terms; every batch's loss and terms.

        A batch without a term (no label counts) is left out: its mean loss is not a number.
        """
        while True:
            for parameter in self.parameters.values():
                parameter.grad = None
            found: list[tuple[Tensor, float]] = []
            for batch, rows in window:
                loss, total = self._loss(batch, rate)
                terms = float(rows if loss.terms is None else loss.terms)
                if not terms:
                    continue
                found.append((loss.mean.detach(), terms))
                # In units of the first batch: how many terms will come is known at the end only.
                share = terms / found[0][1] * self._loss_scale
                torch.autograd.backward(total if share == 1 else total * share)
            if len(found) > 1:
                share = found[0][1] / sum(terms for _, terms in found)
                grads = [p.grad for p in self.parameters.values() if p.grad is not None]
                torch._foreach_mul_(grads, share)
            if not (found and self._scales_loss) or self._unscale():
                return found

    def _unscale(self) -> bool:
        """Undo fp16's loss scale; False if it was too large and the step must be made again."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        torch._foreach_mul_(grads, 1 / self._loss_scale)
        if self._loss_scale == 1 or all(bool(torch.isfinite(g).all()) for g in grads):
            return True
        self._loss_scale /= 2
        return False

    def _loss(self, batch: Any, rate: float) -> tuple[Loss, Tensor]:
        """A batch's loss, alone and with what regularizers add to it."""
        strength = self._args.jacobian_correction
        if strength == 0:
            loss = self._forward(batch)
            return loss, loss.mean
        with composed_weights(self.model) as composed:
            loss = self._forward(batch)
            added = jacobian_correction(loss.mean, composed, rate, strength)
            return loss, loss.mean + added

    def _forward(self, batch: Any) -> Loss:
        with self._precision.autocast():
            return read_loss(self.objective(self.model, batch))

    def _tell_of_batch_norm(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and f"{name}.running_mean".lstrip(".") in self.shared:
                logger.warning(
                    "%r is batch norm: its statistics are averaged over the clients, badly where "
                    "their data differ; group norm has none, and local_modules keeps batch norms "
                    "with each client (FedBN)",
                    name,
                )
                return


def nothing_counts() -> ClientDataError:
    """A client whose labels are all ignored."""
    return ClientDataError(
        "no label counts (all are -100), so there is nothing to learn from: leave the client out"
    )


@contextmanager
def one_row_said() -> Iterator[None]:
    """Batch norm's refusal to normalize one value, as an error of the data."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ClientDataError(
            "batch norm cannot train on a batch of one row: raise per_client_batch_size, leave "
            "clients of one row out, or use group norm"
        ) from error


def _only(state: State, names: Collection[str]) -> State:
    return {n: state[n] for n in names if n in state}


def _clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _difference(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_sub(new, old)) if new else []


def _buffers(model: nn.Module) -> State:
    return persistent_buffers(model)
