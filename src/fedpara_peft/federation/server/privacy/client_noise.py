"""Noise that a client adds to its own update, before anything of it leaves (``dp_mode="local"``).

    Δ_i + N(0, (z C)² I),   ‖Δ_i‖ ≤ C

Whatever follows (codecs, averages, aggregates that see single updates) works on what is protected.
"""

from __future__ import annotations

import dataclasses
import secrets

import torch

from ....comm.state import State
from ....maths.precision import as_real, from_real, wide
from ...arguments import FederatedArguments
from ...random import torch_generator
from ...state import ClientUpdate


def with_own_noise(
    update: ClientUpdate, args: FederatedArguments, round: int, seed: int | None
) -> ClientUpdate:
    """An update that may be seen: clipped and noisy, and without its loss, which has no noise.

    Args:
        update: as trained.
        args: the run's settings.
        round: rounds completed.
        seed: of the noise; None draws one that is nowhere else.
    """
    assert args.clip_update_norm is not None
    seed = secrets.randbits(63) if seed is None else seed
    std = args.dp_noise_multiplier * args.clip_update_norm
    noisy = {}
    for name, exact in clipped(update.update, args.clip_update_norm).items():
        generator = torch_generator(seed, round, update.client, "own noise", name)
        noise = torch.randn(exact.shape, generator=generator, dtype=exact.dtype)
        noisy[name] = from_real(exact + std * noise, update.update[name])
    return dataclasses.replace(update, update=noisy, train_loss=0.0)


def clipped(state: State, norm: float) -> State:
    """A state of norm at most so much, in real numbers of 64 bits on the CPU.

    What is not finite stays so.
    """
    exact = {name: wide(as_real(tensor.detach())).cpu() for name, tensor in state.items()}
    norms = [torch.linalg.vector_norm(tensor) for tensor in exact.values()]
    length = float(torch.stack(norms).norm()) if norms else 0.0
    return exact if length <= norm else {n: t * (norm / length) for n, t in exact.items()}
