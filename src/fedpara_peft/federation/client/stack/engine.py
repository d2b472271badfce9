"""Many small clients in one step, where that is known to pay and shown to be right.

Each client's steps are those of :class:`~..local.LocalTrainer`, up to rounding. What a client costs
beyond its arithmetic is paid once for all; its weights, though, no longer stay in the processor's
cache. So this pays for small adapters, and costs where a client's own weights are large.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from ....comm.state import State
from ....maths.errors import FedParaError
from ....tuner.hooks import has_hooks
from ....tuner.layer import FedParaLayer
from ....tuner.scope import persistent_buffers, remainders
from ...arguments import FederatedArguments
from ...data.loss import DefaultLoss, LossFunction
from ...errors import ArgumentsError, ClientDataError
from ...precision import Precision
from ...state import Broadcast, ClientState
from ..gradients import one_row_said
from ..local import LocalTrainer, Turn
from ..optimizer_state import likeness
from ..steps import CannotPauseError, Stepped, Steps
from .batches import Batches, OneByOneError, likeness_of
from .compared import Compared
from .sideeffects import SideEffects

logger = logging.getLogger(__name__)

_FEWEST_CLIENTS = 8
#: Values in one stack.
_STACK_VALUES = 1 << 24

#: Arguments of :meth:`LocalTrainer.end`.
Ended = tuple[Turn, int, Stepped, State, State]


class BatchedTrainer:
    """Trains clients whose steps have equally many rows side by side.

    The first stack tells whether the model can be stacked at all: it must run, change nothing but
    what is trained, draw no random numbers. And it must have the gradients of the sequential engine
    (:mod:`.compared`).

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
        self._precision = Precision.of(args.mixed_precision, accelerator)
        self._losses = Compared(local, compute_loss, self._precision)
        self._default_loss = isinstance(compute_loss, DefaultLoss)
        self._proven = False
        self._refused = False

    def obstacle(self) -> str | None:
        """What keeps this model or run from being stacked; None if nothing does."""
        args, model = self._args, self._local.model
        if owner := self._local.objective.owner:
            return f"{owner} has a local loss of its own, which is for one client at a time"
        if persistent_buffers(model).keys() - remainders(model).keys():
            return "the model has buffers that training changes (use group norm)"
        if any(_drops(module) for module in model.modules()):
            return "dropout draws other numbers when clients are stacked"
        if _hooked(model):
            return "hooks would see, or miss, the stacked tensors"
        regularized = args.jacobian_correction or args.composed_weight_decay
        if regularized or args.gradient_accumulation_steps > 1 or self._precision.scales_loss:
            return "it has no regularizers, gradient accumulation or fp16"
        return self._local.optimizers.obstacle()

    def wanted(self, num_clients: int) -> bool:
        """Whether stacking so many clients is asked for, or is known to pay."""
        if self._refused:
            return False
        if self._args.engine == "batched":
            return True
        return (
            num_clients >= _FEWEST_CLIENTS
            and self._losses.pays(self._values())
            and self._device.type in ("cpu", "cuda")
            and self._default_loss
            and _keeps_nothing(self._local.reading.collator)
            and self._alone  # stacks follow the processes' shares, and rounding the stacks
        )

    def groups(
        self, data: Mapping[int, Any], states: Mapping[int, ClientState | None]
    ) -> list[list[int]]:
        """Clients whose steps have equally many like rows, as many as are worth a stack.

        Their optimizers must be alike, too, where they are kept: torch counts their steps together.
        """
        alike: dict[Any, list[int]] = {}
        for client, dataset in data.items():
            try:
                like = likeness_of(dataset, self._args, self._local.reading.last_batch())
            except ClientDataError:  # which the sequential engine says, and whose
                continue
            state = states[client]
            kept = likeness(state.optimizer) if state is not None else ()
            alike.setdefault((like, kept), []).append(client)
        most = max(1, _STACK_VALUES // max(1, self._values()))
        if (bound := self._losses.most_clients) is not None:
            most = min(most, bound)
        stacks = []
        for group in alike.values():
            parts = -(-len(group) // most)
            bounds = [len(group) * i // parts for i in range(parts + 1)]
            stacks += [group[a:b] for a, b in itertools.pairwise(bounds)]
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
        """Train clients whose steps are alike; arguments of :meth:`LocalTrainer.end` for each.

        Args:
            clients: client indices.
            datasets: theirs.
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
        self._local.load(broadcast.params, states[0])
        effects = None if self._proven else SideEffects(model, self._device)
        changed = effects.found if effects else lambda: None
        undo = effects.undo if effects else lambda: None
        cause: Exception | None = None
        try:
            with one_row_said():
                ended = self._train(clients, datasets, round, broadcast, states, resting)
        # Of data or loss, which the sequential engine finds, and says whose; or steps differ.
        except (FedParaError, CannotPauseError, OneByOneError):
            undo()
            return None
        except Exception as error:
            cause, reason = error, changed()
            undo()  # it may have failed because of that
            if reason is None:
                of_data = self._losses.fails_alone()
                undo()
                if of_data:
                    return None
                first = str(error).partition("\n")[0]
                reason = f"running it stacked raises {type(error).__name__}: {first:.200}"
        else:
            reason = changed()
            if reason is None:
                self._proven = True
                return ended
            undo()
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
        todo = Batches(clients, datasets, round, self._args, local.reading, self._device)
        for batches, rows in todo:
            batches = [send_to_device(batch, self._device) for batch in batches]
            loss, counts = self._losses(stack, batches, rows)
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

    def _values(self) -> int:
        return sum(p.numel() for p in self._local.parameters.values())


def _keeps_nothing(collator: Any) -> bool:
    """Whether a collator is known to make the same of rows however often it is asked."""
    own = type(collator).__module__.partition(".")[0]
    return collator is None or (own == "transformers" and getattr(collator, "seed", None) is None)


def _hooked(model: nn.Module) -> bool:
    """Whether anything of the model has hooks, the user's or of old-style weight norm."""
    return any(map(has_hooks, model.modules())) or any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()
    )


def _drops(module: nn.Module) -> bool:
    if isinstance(module, FedParaLayer):
        return any(s.rank_dropout or s.module_dropout for s in module.specs.values())
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
