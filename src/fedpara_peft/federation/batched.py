"""Many small clients in one step: their factors stacked, the model mapped over the stack.

Each client's steps are those of :class:`~.client.LocalTrainer`, up to rounding. What a client costs
beyond its arithmetic is paid once for all; its weights, though, no longer stay in the processor's
cache. So this pays for small adapters, and costs where a client's weights are large.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from ..comm.state import State
from ..tuner.layer import FedParaLayer
from ..tuner.scope import persistent_buffers
from .arguments import FederatedArguments
from .batches import tensors_of
from .client import LocalTrainer, LossFunction, Turn
from .loss import default_loss
from .random import torch_generator
from .state import Broadcast, ClientState
from .step_weights import StepWeights, clip_scale
from .strategies import LocalSteps

#: Trained values of a client up to which stacking paid on the CPU it was measured on.
_MOST_VALUES = 20_000
_FEWEST_CLIENTS = 8
#: Values in one stack.
_STACK_VALUES = 1 << 24


class BatchedTrainer:
    """Trains clients with equally many examples side by side.

    Args:
        local: the sequential engine, which begins and ends the clients' turns.
        args: the run's settings.
        accelerator: device.
        compute_loss: ``(model, batch) -> loss`` or ``(loss, outputs)``.
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
        self._default_loss = compute_loss is default_loss
        self._plain = accelerator.mixed_precision == "no"

    def obstacle(self) -> str | None:
        """What keeps this model or run from being stacked; None if nothing does."""
        args, model = self._args, self._local.model
        if persistent_buffers(model):
            return "the model has buffers that training changes (use group norm)"
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            return "fused recurrent kernels cannot be mapped"
        if any(_drops(module) for module in model.modules()):
            return "dropout draws other numbers when clients are stacked"
        if args.jacobian_correction or args.gradient_accumulation_steps > 1 or not self._plain:
            return "it has no Jacobian correction, gradient accumulation or mixed precision"
        return None

    def wanted(self, num_clients: int) -> bool:
        """Whether stacking so many clients is asked for, or is known to pay."""
        if self._args.engine == "batched":
            return True
        return (
            num_clients >= _FEWEST_CLIENTS
            and self._values() <= _MOST_VALUES
            and self._device.type == "cpu"
            and self._default_loss
            # Stacks follow the processes' shares, and rounding the stacks.
            and self._alone
            # Their own losses and hidden dropouts are not known here.
            and not hasattr(getattr(self._local.model, "config", None), "model_type")
        )

    def groups(self, data: Mapping[int, Any]) -> list[list[int]]:
        """Clients of equally many examples, as many as are worth a stack; others are left out."""
        by_size: dict[int, list[int]] = {}
        for client, dataset in data.items():
            if tensors_of(dataset) is not None:
                by_size.setdefault(len(dataset), []).append(client)
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
    ) -> list[tuple[Turn, int, float, LocalSteps, State, State]]:
        """Train clients of equally many examples; arguments of :meth:`LocalTrainer.end` for each.

        Args:
            clients: client indices.
            datasets: tensor data sets.
            round: rounds completed.
            broadcast: what the clients received.
            states: what they kept.
            resting: names that do not train this round.
        """
        local, args = self._local, self._args
        turns = [
            local.begin(c, round, broadcast, s, resting)
            for c, s in zip(clients, states, strict=True)
        ]
        local.load(broadcast.params)
        count = len(clients)
        own = [local.first_local if s is None else s.local for s in states]
        stack = {n: p.expand(count, *p.shape).clone() for n, p in turns[0].seen.params.items()}
        for name, tensor in local.local.items():
            stack[name] = torch.stack([state[name].to(tensor.device) for state in own])
        optimizer = _StackedSGD(stack, turns, args, args.learning_rate_at(round))
        gradients = vmap(grad_and_value(self._mean_loss), in_dims=(0, 0))
        local.model.train()
        losses, sizes = [], []
        for epoch in range(args.num_local_epochs):
            orders = [torch_generator(args.seed, round, c, f"batches {epoch}") for c in clients]
            columns = _gathered(datasets, orders, self._device)
            for batch in zip(
                *(torch.split(c, args.per_client_batch_size, 1) for c in columns), strict=True
            ):
                grads, loss = gradients(stack, batch)
                stack = optimizer.step(stack, grads)
                losses.append(loss.detach())
                sizes.append(batch[0].shape[1])
        weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        means = (torch.stack(losses).cpu().double() * weights[:, None]).sum(0).tolist()
        totals = (
            torch.as_tensor(optimizer.weights.total, dtype=torch.float64).expand(count).tolist()
        )
        rate = args.learning_rate_at(round)
        return [
            (
                turn,
                len(datasets[i]),
                means[i],
                LocalSteps(len(sizes), rate, totals[i]),
                {n: stack[n][i] for n in turn.seen.params},
                {n: stack[n][i].clone() for n in local.local},
            )
            for i, turn in enumerate(turns)
        ]

    def _values(self) -> int:
        return sum(p.numel() for p in self._local.parameters.values())

    def _mean_loss(self, tensors: State, batch: Any) -> Tensor:
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        loss: Tensor = functional_call(self._loss, named, (batch,))
        return loss


class _Loss(nn.Module):
    """A loss function as a module, so that the model's tensors can be exchanged in it."""

    def __init__(self, model: nn.Module, compute_loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._compute = compute_loss

    def forward(self, batch: Any) -> Tensor:
        output = self._compute(self.model, batch)
        return output[0] if isinstance(output, tuple) else output


class _StackedSGD:
    """The sequential engine's correction, clipping and step, for every client of a stack."""

    def __init__(
        self, stack: State, turns: Sequence[Turn], args: FederatedArguments, rate: float
    ) -> None:
        self._args, self._rate = args, rate
        self._start = turns[0].seen.params
        corrections = [turn.correction for turn in turns]
        first = corrections[0]
        self._pull = first.pull if first else 0.0
        offsets = [(c.offset if c else None) or {} for c in corrections]
        self._offset = {
            n: torch.stack([o[n] if n in o else torch.zeros_like(stack[n][0]) for o in offsets])
            for n in {name for offset in offsets for name in offset}
        }
        self._velocity: State = {}
        self.weights = StepWeights(args.momentum)

    def step(self, stack: State, grads: State) -> State:
        """The stack after a step."""
        args = self._args
        found = {n: self._corrected(n, stack[n], grad) for n, grad in grads.items()}
        if args.max_grad_norm is not None:
            squares = [g.flatten(1).square().sum(1) for g in found.values()]
            norms = functools.reduce(torch.add, squares).sqrt()
            scale = clip_scale(norms, args.max_grad_norm)
            found = {n: g * scale.view(-1, *[1] * (g.dim() - 1)) for n, g in found.items()}
            self.weights.step(scale)
        else:
            self.weights.step()
        if args.weight_decay:
            found = {n: g.add(stack[n], alpha=args.weight_decay) for n, g in found.items()}
        if args.momentum:
            found = {
                n: self._velocity[n] * args.momentum + g if n in self._velocity else g
                for n, g in found.items()
            }
            self._velocity = found
        return {n: p.add(found[n], alpha=-self._rate) for n, p in stack.items()}

    def _corrected(self, name: str, value: Tensor, grad: Tensor) -> Tensor:
        if self._pull and name in self._start:
            grad = grad.add(value - self._start[name], alpha=self._pull)
        return grad + self._offset[name] if name in self._offset else grad


def _gathered(
    datasets: Sequence[Any], orders: Sequence[torch.Generator], device: torch.device
) -> list[Tensor]:
    """Every client's rows in its own order, ``(clients, examples, ...)`` for each column."""
    rows = []
    for data, generator in zip(datasets, orders, strict=True):
        found = tensors_of(data)
        assert found is not None
        tensors, own = found
        order = torch.randperm(len(data), generator=generator)
        rows.append([t[order if own is None else own[order]] for t in tensors])
    return [torch.stack(list(column)).to(device) for column in zip(*rows, strict=True)]


def _drops(module: nn.Module) -> bool:
    if isinstance(module, FedParaLayer):
        return any(s.rank_dropout or s.module_dropout for s in module.specs.values())
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
