"""A client's local training."""

from __future__ import annotations

import functools
import itertools
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
from ...tuner.scope import factor_names, hold_remainders, persistent_buffers, remainders
from ..arguments import FederatedArguments
from ..data.batches import Collator, count_rows
from ..data.loss import LossFunction
from ..data.normalization import tell_of_shared_statistics
from ..errors import ArgumentsError, about
from ..precision import Precision
from ..random import preserved, reseed
from ..state import Broadcast, ClientState, ClientUpdate, Remainders, ServerState
from ..strategies import Correction, LocalSteps, Objective, Strategy
from .gradients import Gradients, one_row_said
from .optimizer import OptimizerFactory, Optimizers
from .optimizer_state import Kept
from .reading import Reading
from .steps import Stepped, Steps, in_a_round, told_terms
from .trainers.given import GivenTrainer


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
        optimizer: what it kept of its optimizer.
    """

    client: int
    round: int
    seen: Broadcast
    kept: Mapping[str, State]
    residual: State
    correction: Correction | None
    optimizer: Kept


@dataclass(frozen=True)
class Trained:
    """A client that has trained and not yet sent anything.

    Attributes:
        turn: what it trained from.
        update: what it has to send.
        steps: how it trained.
        local: its tensors of local scope.
        optimizer: what it keeps of its optimizer.
        terms: what it trained on: rows, or tokens that count, each as often as it was seen.
    """

    turn: Turn
    update: ClientUpdate
    steps: LocalSteps
    local: State
    optimizer: Kept
    terms: float | None = None

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
        optimizer: the clients'; that of ``args`` by default.
        given: a trainer of others, in place of the local steps.

    Attributes:
        shared: the communicated tensors, live.
        local: the tensors of local scope, live.
        buffers: names in ``shared`` that are buffers.
        held: names in ``shared`` that the server moves, and no client: with ``exact_average``.
        first_local: the local tensors of a client that never trained.
        parameters: the trainable parameters, live.
        objective: what clients minimize.
        optimizers: makes a client's optimizer.
        reading: how clients read their data.
        gradients: makes the gradients of a step.

    Raises:
        ArgumentsError: the model has no trainable parameters, or none of the needed scope; or the
            optimizer suits neither arguments nor strategy.
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
        optimizer: OptimizerFactory | None = None,
        given: GivenTrainer | None = None,
    ) -> None:
        self.model = model
        self._given = given
        self._args = args
        self._accelerator = accelerator
        self._strategy = strategy
        self.objective = Objective(strategy, compute_loss)
        self.reading = Reading(args, model, collator)
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
        if args.exact_average:
            hold_remainders(model)
        moved = remainders(model) if args.exact_average else {}
        self.held, self.shared = frozenset(moved), {**self.shared, **moved}
        buffers = {n: t for n, t in persistent_buffers(model).items() if n not in moved}
        self.buffers = frozenset(buffers) & self.shared.keys()
        tell_of_shared_statistics(model, self.shared)
        self.first_local = _clone(self.local)
        # Buffers of a frozen base (batch-norm statistics) start afresh for every client.
        self._resting = [t for n, t in buffers.items() if n not in {**self.shared, **self.local}]
        self._first_resting = [t.clone() for t in self._resting]
        self.optimizers = Optimizers(args, optimizer, self.parameters, factor_names(model))
        if strategy.sums_gradients and not self.optimizers.sums_gradients:
            raise ArgumentsError(
                f"{type(strategy).__name__} cannot have {self.optimizers.name} with these options: "
                "its steps are no sum of the gradients at one learning rate; use plain SGD, or "
                "another strategy"
            )
        precision = Precision.of(args.mixed_precision, accelerator)
        self.gradients = Gradients(model, self.parameters, self.objective, precision, args)

    def begin_with(self, first_local: State) -> None:
        """Have clients that never trained begin with these local tensors, where there are any."""
        for name, tensor in first_local.items():
            self.first_local[name].copy_(tensor)

    def load(self, params: State, state: ClientState | None = None) -> None:
        """Put a global state and a client's own into the model; a new client's by default."""
        local = self.first_local if state is None else state.local
        with torch.no_grad():
            _copy(list(self.shared.values()), [params[n] for n in self.shared])
            _copy(list(self.local.values()), [local[n] for n in self.local])
            _copy(self._resting, self._first_resting)

    def first_server(self) -> ServerState:
        """The server before the first round, its tensors live."""
        return ServerState(
            0,
            self.shared,
            buffers=self.buffers,
            remainders=Remainders(self.held),
            clip_norm=self._args.start_clip_norm,
        )

    @property
    def device(self) -> torch.device:
        """Where clients train."""
        return self._accelerator.device

    def name(self, client: int) -> Any:
        """A client's name, for messages."""
        return client if self._names is None else self._names[client]

    @contextmanager
    def at_work(self, resting: Collection[str]) -> Iterator[None]:
        """While clients train: these parameters rest, and the global generators are put back."""
        try:
            for name in resting:
                self.parameters[name].requires_grad_(False)
            with preserved(self._accelerator.device):
                yield
        finally:
            for name in resting:
                self.parameters[name].requires_grad_(True)

    def train(
        self,
        client: int,
        dataset: Any,
        round: int,
        broadcast: Broadcast,
        state: ClientState | None = None,
        resting: Collection[str] = (),
    ) -> Trained:
        """Train a client from the broadcast: E epochs (Sec. 3 of arXiv:2108.06098) or steps.

        Args:
            client: client index, for the derived randomness.
            dataset: the client's examples.
            round: rounds completed, for the learning rate and the derived randomness.
            broadcast: what the client received.
            state: what it kept from its last round.
            resting: names that do not train this round (see :meth:`at_work`) and are not sent.

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
            stepped = self._steps(turn, dataset)
        here = {n: self.shared[n] for n in turn.seen.params}
        return self.end(turn, examples, stepped, here, _clone(self.local))

    def begin(
        self, client: int, round: int, broadcast: Broadcast, state: ClientState | None,
        resting: Collection[str],
    ) -> Turn:  # fmt: skip
        """What a client trains from; arguments as in :meth:`train`."""
        kept = {} if state is None else self._placed(state.strategy)
        active = [n for n in self.shared if n not in resting and n not in self.held]
        seen = Broadcast(_only(broadcast.params, active), broadcast.extra, broadcast.clip_norm)
        correction = self._strategy.correction(seen, kept)
        own = ClientState() if state is None else state
        keeps = self._args.optimizer_state == "keep"
        return Turn(
            client, round, seen, kept, own.residual, correction, own.optimizer if keeps else {}
        )

    def end(
        self,
        turn: Turn,
        num_examples: int,
        stepped: Stepped,
        shared: State,
        local: State,
    ) -> Trained:
        """What a client has to send, from the tensors it ended with.

        Raises:
            PayloadError: it diverged, so there is nothing to send.
        """
        loss, steps = stepped.loss, stepped.steps
        if not math.isfinite(loss) or stepped.stuck:
            raise PayloadError(
                "diverged",
                f"it diverged in round {turn.round + 1} (loss {loss}): lower learning_rate (now "
                f"{steps.learning_rate:.3g}) or set max_grad_norm",
            )
        start = turn.seen.params
        names = [n for n in start if n not in self.buffers]
        change = [[shared[n] for n in names], [start[n] for n in names]]
        update = dict(zip(names, torch._foreach_sub(*change) if names else (), strict=True))
        buffers = {n: shared[n].clone() for n in start if n in self.buffers}
        told = steps if self._strategy.sees_updates else None
        terms = told_terms(stepped, self._args)
        sent = ClientUpdate(turn.client, num_examples, update, loss, {}, buffers, told, terms=terms)
        trained = Trained(turn, sent, steps, local, stepped.kept, stepped.terms)
        extra = self._strategy.client_extra(turn.seen, trained.active, update, steps)
        return replace(trained, update=replace(sent, extra=extra))

    def _placed(self, kept: Mapping[str, State]) -> dict[str, State]:
        """What a client keeps, where its tensors train."""
        return {
            group: {name: tensor.to(self.shared[name].device) for name, tensor in state.items()}
            for group, state in kept.items()
        }

    def _steps(self, turn: Turn, dataset: Any) -> Stepped:
        args, round, client = self._args, turn.round, turn.client
        seed = self.reading.seed(client, round)
        if self._given is not None:
            return self._given.train(dataset, self.name(client), round, seed, self.device)
        active = {n: p for n, p in self.parameters.items() if p.requires_grad}
        steps = Steps(
            self.optimizers, args, round, active, turn.seen.params, [turn.correction],
            [turn.optimizer],
        )  # fmt: skip
        self.gradients.begin(args.learning_rate_at(round, factors=True))
        self.model.train()
        # Dropout, transforms and collators draw from the global generators; see at_work.
        reseed(seed, self.device)
        with one_row_said():
            for window in in_a_round(functools.partial(self._windows, turn, dataset), args):
                if losses := self.gradients.of(window):
                    steps.step(losses)
        return steps.final()[0]

    def _windows(self, turn: Turn, dataset: Any, epoch: int) -> Iterator[list[tuple[Any, int]]]:
        """The batches of every local step of an epoch, and of how many rows each is."""
        args, device = self._args, self.device
        rows = self.reading.epoch(turn.client, turn.round, dataset, epoch)
        while window := list(itertools.islice(rows, args.gradient_accumulation_steps)):
            if device.type == "cpu":
                yield window
            else:
                yield [(send_to_device(batch, device), count) for batch, count in window]


def _only(state: State, names: Collection[str]) -> State:
    return {n: state[n] for n in names if n in state}


def _clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
