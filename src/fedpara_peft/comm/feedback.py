"""Error feedback (Seide et al. 2014; Karimireddy et al., arXiv:1901.09847)."""

from __future__ import annotations

import torch

from .payload import Format, Payload
from .state import State


def encode_with_feedback(
    form: Format, state: State, residual: State, round: int, generator: torch.Generator
) -> tuple[Payload, State, State]:
    """Send what a codec lost the last time along with this time's state.

        p = C(x + e),   e' = x + e - p

    Args:
        form: schema and codec.
        state: x.
        residual: e, floating-point tensors by name; those it lacks are zero.
        round: number of the round.
        generator: for stochastic codecs.

    Returns:
        The payload, what it decodes to (p), and the next residual e'.
    """
    wanted = {n: t + residual[n].to(t.device) if n in residual else t for n, t in state.items()}
    payload = form.encode(wanted, round, generator)
    received = form.decode(payload.data, round)
    lost = {n: t - received[n].to(t.device) for n, t in wanted.items() if t.is_floating_point()}
    return payload, received, lost
