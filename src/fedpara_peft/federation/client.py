"""A client's local training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..comm.state import State
from ..tuner.jacobian import composed_weights, jacobian_correction
from .arguments import FederatedArguments
from .batches import Collator, batches
from .errors import RoundError
from .loss import batch_size
from .random import derived_seed, torch_generator
from .strategies import Strategy

LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]]


def train_client(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    *,
    args: FederatedArguments,
    accelerator: Accelerator,
    compute_loss: LossFunction,
    collator: Collator | None,
    strategy: Strategy,
    broadcast: State,
    round: int,
    client: int,
) -> float:
    """Train the model in place on a client's data: E epochs of SGD, Sec. 3 of arXiv:2108.06098.

    Args:
        model: holds the broadcast.
        optimizer: over the model's trainable parameters; its state is cleared first.
        dataset: the client's examples.
        args: the run's settings.
        accelerator: device and mixed precision.
        compute_loss: ``(model, batch) -> loss`` or ``(loss, outputs)``.
        collator: makes a batch from rows.
        strategy: corrects the gradients.
        broadcast: w_t as received.
        round: round number, for the learning rate and the derived randomness.
        client: client index, for the derived randomness.

    Returns:
        Mean loss over all local examples seen.

    Raises:
        RoundError: the loss is not finite.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate_at(round)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    seen = 0
    with torch.random.fork_rng(devices=_cuda_devices(accelerator)):
        # Dropout and the like draw from the global generators.
        torch.manual_seed(derived_seed(args.seed, round, client, "training"))
        for epoch in range(args.num_local_epochs):
            order = torch_generator(args.seed, round, client, f"batches {epoch}")
            for batch in batches(dataset, args.per_client_batch_size, collator, order):
                batch = send_to_device(batch, accelerator.device)
                optimizer.zero_grad(set_to_none=True)
                loss, penalty = _loss(model, batch, compute_loss, accelerator, args, round)
                accelerator.backward(loss + penalty)
                _correct(named, broadcast, strategy)
                if args.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(named.values(), args.max_grad_norm)
                optimizer.step()
                examples = batch_size(batch)
                total += loss.detach().double() * examples
                seen += examples
    mean = float(total / seen)
    if not math.isfinite(mean):
        raise RoundError(
            f"client {client} diverged in round {round + 1} (loss {mean}): lower learning_rate "
            f"(now {args.learning_rate_at(round):.3g}) or set max_grad_norm"
        )
    return mean


def _loss(
    model: nn.Module,
    batch: Any,
    compute_loss: LossFunction,
    accelerator: Accelerator,
    args: FederatedArguments,
    round: int,
) -> tuple[Tensor, Tensor | float]:
    """The batch's loss and what regularizers add to it."""
    if args.jacobian_correction == 0:
        return _forward(model, batch, compute_loss, accelerator), 0.0
    with composed_weights(model) as composed:
        loss = _forward(model, batch, compute_loss, accelerator)
        rate = args.learning_rate_at(round)
        return loss, jacobian_correction(loss, composed, rate, args.jacobian_correction)


def _forward(
    model: nn.Module, batch: Any, compute_loss: LossFunction, accelerator: Accelerator
) -> Tensor:
    with accelerator.autocast():
        output = compute_loss(model, batch)
    return output[0] if isinstance(output, tuple) else output


def _correct(named: Mapping[str, nn.Parameter], broadcast: State, strategy: Strategy) -> None:
    """Let the strategy correct the gradients in place."""
    grads = {n: p.grad for n, p in named.items() if p.grad is not None}
    with torch.no_grad():
        corrected = strategy.correct(grads, named, broadcast)
    if corrected is not grads:
        for name, grad in corrected.items():
            named[name].grad = grad


def difference(state: State, broadcast: State) -> State:
    """A client's update: local minus broadcast."""
    return {name: state[name] - w for name, w in broadcast.items()}


def _cuda_devices(accelerator: Accelerator) -> list[torch.device]:
    return [accelerator.device] if accelerator.device.type == "cuda" else []
