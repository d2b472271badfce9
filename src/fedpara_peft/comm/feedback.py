"""Error feedback (Seide et al. 2014; Karimireddy et al., arXiv:1901.09847)."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .payload import Format, Payload
from .state import State


def encode_with_feedback(
    form: Format,
    state: State,
    residual: State,
    round: int,
    generator: torch.Generator,
    names: Collection[str] | None = None,
) -> tuple[Payload, State, State]:
    """Send what a codec lost the last time along with this time's state.

        p = C(x + e),   e' = x + e - p

    Args:
        form: schema and codec.
        state: x.
        residual: e by name; what it lacks is zero.
        round: number of the round.
        generator: for stochastic codecs.
        names: whose loss is made up for; all that the codec may change by default.

    Returns:
        The payload, what it decodes to (p), and the next residual e'.
    """
    fed = form.coded if names is None else form.coded & frozenset(names)
    wanted = {
        n: t + residual[n].to(t.device) if n in fed and n in residual else t
        for n, t in state.items()
    }
    payload = form.encode(wanted, round, generator)
    received = form.decode(payload.data, round)
    lost = {n: t - received[n].to(t.device) for n, t in wanted.items() if n in fed}
    return payload, received, lost
