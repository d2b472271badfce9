"""Many small clients in one step: their factors stacked, the model mapped over the stack.

Each client's steps are those of :class:`~.local.LocalTrainer`, up to rounding. What a client costs
beyond its arithmetic is paid once for all; its weights, though, no longer stay in the processor's
cache. So this pays for small adapters, and costs where a client's weights are large.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ...comm.state import State
from ...maths.errors import FedParaError
from ...maths.precision import wide
from ...tuner.layer import FedParaLayer
from ...tuner.scope import persistent_buffers, remainders
from ..arguments import FederatedArguments
from ..data.batches import batch_sizes, tensors_of
from ..data.loss import DefaultLoss, LossFunction, read_loss
from ..errors import ArgumentsError
from ..precision import Precision
from ..random import torch_generator
from ..state import Broadcast, ClientState
from .gradients import one_row_said
from .local import LocalTrainer, Turn
from .optimizer_state import likeness
from .sideeffects import SideEffects
from .steps import CannotPauseError, Stepped, Steps, in_a_round

logger = logging.getLogger(__name__)

#: Trained values of a client up to which stacking paid on the CPU it was measured on (on a GPU it
#: paid most, and was measured up to half of that).
_MOST_VALUES = 20_000
_FEWEST_CLIENTS = 8
#: Values in one stack.
_STACK_VALUES = 1 << 24
#: Relative difference of the two engines' first gradients that rounding does not explain.
_DISAGREE = 1e-2

#: Arguments of :meth:`LocalTrainer.end`.
Ended = tuple[Turn, int, Stepped, State, State]


class BatchedTrainer:
    """Trains clients with equally many examples side by side.

    The first stack tells whether the model can be stacked at all: it must run, change nothing but
    what is trained, draw no random numbers, and have the gradients of the sequential engine.

    Args:
        local: the sequential engine, which begins and ends the clients' turns.
        args: the run's settings.
        accelerator: device.
        compute_loss: from the model and a batch to what :func:`~..data.loss.read_loss` reads.
    """

    def __init__(
        self,
        local: LocalTrainer,
        args: FederatedArguments,
        accelerator: Accelerator,
        compute_loss: LossFunction,
    ) -> None:
        self._local = local
        self._args = args
        self._device = accelerator.device
        self._alone = accelerator.num_processes == 1
        self._loss = _Loss(local.model, compute_loss)
        self._default_loss = isinstance(compute_loss, DefaultLoss)
        self._plain = Precision.of(args.mixed_precision, accelerator).is_full
        self._proven = False
        self._refused = False

    def obstacle(self) -> str | None:
        """What keeps this model or run from being stacked; None if nothing does."""
        args, model = self._args, self._local.model
        if owner := self._local.objective.owner:
            return f"{owner} has a local loss of its own, which is for one client at a time"
        if self._local.collator is not None:
            return "a data_collator makes each client's batches from its rows"
        if persistent_buffers(model).keys() - remainders(model).keys():
            return "the model has buffers that training changes (use group norm)"
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            return "fused recurrent kernels cannot be mapped"
        if any(_drops(module) for module in model.modules()):
            return "dropout draws other numbers when clients are stacked"
        if _hooked(model):
            return "hooks would see, or miss, the stacked tensors"
        regularized = args.jacobian_correction or args.composed_weight_decay
        if regularized or args.gradient_accumulation_steps > 1 or not self._plain:
            return "it has no regularizers, gradient accumulation or mixed precision"
        return self._local.optimizers.obstacle()

    def wanted(self, num_clients: int) -> bool:
        """Whether stacking so many clients is asked for, or is known to pay."""
        if self._refused:
            return False
        if self._args.engine == "batched":
            return True
        return (
            num_clients >= _FEWEST_CLIENTS
            and self._values() <= _MOST_VALUES
            and self._device.type in ("cpu", "cuda")
            and self._default_loss
            # Stacks follow the processes' shares, and rounding the stacks.
            and self._alone
            # Their own losses and hidden dropouts are not known here.
            and not hasattr(getattr(self._local.model, "config", None), "model_type")
        )

    def groups(
        self, data: Mapping[int, Any], states: Mapping[int, ClientState | None]
    ) -> list[list[int]]:
        """Clients of equally many like examples, as many as are worth a stack; not the others.

        Their optimizers must be alike, too, where they are kept: torch counts their steps together.
        """
        by_size: dict[Any, list[int]] = {}
        for client, dataset in data.items():
            if (found := tensors_of(dataset)) is not None:
                like = tuple((t.shape[1:], t.dtype, t.device) for t in found[0])
                state = states[client]
                kept = likeness(state.optimizer) if state is not None else ()
                by_size.setdefault((len(dataset), like, kept), []).append(client)
        most = max(1, _STACK_VALUES // max(1, self._values()))
        stacks = [
            group[i : i + most] for group in by_size.values() for i in range(0, len(group), most)
        ]
        fewest = 2 if self._args.engine == "batched" else _FEWEST_CLIENTS
        return [group for group in stacks if len(group) >= fewest]

    def train(
        self,
        clients: Sequence[int],
        datasets: Sequence[Any],
        round: int,
        broadcast: Broadcast,
        states: Sequence[ClientState | None],
        resting: Collection[str] = (),
    ) -> list[Ended] | None:
        """Train clients of equally many examples; arguments of :meth:`LocalTrainer.end` for each.

        Args:
            clients: client indices.
            datasets: tensor data sets.
            round: rounds completed.
            broadcast: what the clients received.
            states: what they kept.
            resting: names that do not train this round.

        Returns:
            None where they must train one after the other, and nothing has changed: a client's
            data are refused, some have batches in which no label counts, which an optimizer such
            as Adam cannot leave out, or the model turns out not to be one that can be stacked. With
            ``engine="auto"`` that is logged once, and nothing is stacked again.

        Raises:
            ArgumentsError: the model cannot be stacked, with ``engine="batched"``.
        """
        model = self._local.model
        model.train()
        effects = None if self._proven else SideEffects(model, self._device)
        cause: Exception | None = None
        try:
            with one_row_said():
                ended = self._train(clients, datasets, round, broadcast, states, resting)
            reason = None if effects is None else effects.found()
            if reason is None:
                self._proven = True
                return ended
        # Of data or loss, which the sequential engine finds, and says whose; or steps differ.
        except (FedParaError, CannotPauseError):
            if effects is not None:
                effects.undo()
            return None
        except Exception as error:
            cause = error
            first = str(error).partition("\n")[0]
            reason = f"running it stacked raises {type(error).__name__}: {first:.200}"
            reason = (effects and effects.found()) or reason  # rather the cause than what follows
        if effects is not None:
            effects.undo()
        if self._args.engine == "batched":
            raise ArgumentsError(
                f"engine='batched' is not possible: {reason}; use engine='sequential'"
            ) from cause
        logger.warning("clients train one after the other, the model cannot be stacked: %s", reason)
        self._refused = True
        return None

    def _train(
        self,
        clients: Sequence[int],
        datasets: Sequence[Any],
        round: int,
        broadcast: Broadcast,
        states: Sequence[ClientState | None],
        resting: Collection[str],
    ) -> list[Ended]:
        local = self._local
        turns = [
            local.begin(c, round, broadcast, s, resting)
            for c, s in zip(clients, states, strict=True)
        ]
        local.load(broadcast.params, states[0])
        count = len(clients)
        own = [local.first_local if s is None else s.local for s in states]
        stack = {n: p.expand(count, *p.shape).clone() for n, p in turns[0].seen.params.items()}
        for name, tensor in local.local.items():
            stack[name] = torch.stack([state[name].to(tensor.device) for state in own])
        stack = {n: tensor.requires_grad_() for n, tensor in stack.items()}
        steps = Steps(
            local.optimizers, self._args, round, stack, turns[0].seen.params,
            [t.correction for t in turns], [t.optimizer for t in turns], count,
        )  # fmt: skip
        first = True
        for batch, rows in self._batches(clients, datasets, round):
            loss, counts = self._gradients(stack, batch, rows)
            if first and not self._proven:
                self._compare([column[0] for column in batch], stack)
            first = False
            made = None if bool(counts.all()) else counts > 0
            steps.step([(loss if made is None else loss.where(made, 0), counts)], made)
        ended = {n: tensor.detach() for n, tensor in stack.items()}
        return [
            (
                turn,
                len(datasets[i]),
                stepped,
                {n: ended[n][i] for n in turn.seen.params},
                {n: ended[n][i].clone() for n in local.local},
            )
            for i, (turn, stepped) in enumerate(zip(turns, steps.final(), strict=True))
        ]

    def _batches(
        self, clients: Sequence[int], datasets: Sequence[Any], round: int
    ) -> Iterator[tuple[tuple[Tensor, ...], int]]:
        """Every client's batches in its own order, ``(clients, rows, ...)`` for each column."""
        args = self._args
        sizes = batch_sizes(len(datasets[0]), args.per_client_batch_size, self._local.last_batch())

        def of(epoch: int) -> Iterator[tuple[tuple[Tensor, ...], int]]:
            orders = [torch_generator(args.seed, round, c, f"batches {epoch}") for c in clients]
            columns = [column[:, : sum(sizes)] for column in _gathered(datasets, orders)]
            parts = [torch.split(column.to(self._device), sizes, 1) for column in columns]
            yield from zip(zip(*parts, strict=True), sizes, strict=True)

        return in_a_round(of, args)

    def _gradients(
        self, stack: State, batch: tuple[Tensor, ...], rows: int
    ) -> tuple[Tensor, Tensor]:
        """Fill the stack's gradients; mean loss and number of terms of every client."""

        def one(tensors: State, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            named = {f"model.{name}": tensor for name, tensor in tensors.items()}
            found: tuple[Tensor, Tensor] = functional_call(self._loss, named, (batch, rows))
            return found

        losses, terms = vmap(one)(stack, batch)
        for tensor in stack.values():
            tensor.grad = None
        torch.autograd.backward(losses.sum(), inputs=list(stack.values()))
        return losses.detach(), terms

    def _compare(self, batch: Sequence[Tensor], stack: State) -> None:
        """The first client's gradients against those that it has alone; the model holds it."""
        grads = {n: t.grad[0] for n, t in stack.items() if t.grad is not None}
        parameters = {n: p for n, p in self._local.parameters.items() if p.requires_grad}
        loss, _ = self._loss(tuple(batch), len(batch[0]))
        if not bool(loss.isfinite()):
            return
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        alone = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        if alone.keys() != grads.keys():
            names = sorted(alone.keys() ^ grads.keys())
            raise RuntimeError(f"stacked clients train other parameters, {names[:3]}")
        apart = sum(float(wide(grads[n] - g).square().sum()) for n, g in alone.items())
        size = sum(float(wide(g).square().sum()) for g in alone.values())
        if apart > _DISAGREE**2 * size:
            raise RuntimeError(f"gradients differ by {(apart / size) ** 0.5:.0%} from those alone")

    def _values(self) -> int:
        return sum(p.numel() for p in self._local.parameters.values())


class _Loss(nn.Module):
    """A loss function as a module, so that the model's tensors can be exchanged in it."""

    def __init__(self, model: nn.Module, compute_loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._compute = compute_loss

    def forward(self, batch: Any, rows: int) -> tuple[Tensor, Tensor]:
        found = read_loss(self._compute(self.model, batch))
        terms = rows if found.terms is None else found.terms
        return found.mean, torch.as_tensor(terms, dtype=torch.float32, device=found.mean.device)


def _gathered(datasets: Sequence[Any], orders: Sequence[torch.Generator]) -> list[Tensor]:
    """Every client's rows in its own order, ``(clients, examples, ...)`` for each column."""
    rows = []
    for data, generator in zip(datasets, orders, strict=True):
        found = tensors_of(data)
        assert found is not None
        tensors, own = found
        order = torch.randperm(len(data), generator=generator)
        rows.append([t[order if own is None else own[order]] for t in tensors])
    return [torch.stack(list(column)) for column in zip(*rows, strict=True)]


def _hooked(model: nn.Module) -> bool:
    """Whether anything of the model has hooks, the user's or of old-style weight norm."""
    on_modules = (
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    )  # fmt: skip
    return (
        any(getattr(module, hooks) for module in model.modules() for hooks in on_modules)
        or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _drops(module: nn.Module) -> bool:
    if isinstance(module, FedParaLayer):
        return any(s.rank_dropout or s.module_dropout for s in module.specs.values())
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
