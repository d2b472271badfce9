"""Which updates of a round are used."""

from __future__ import annotations

import dataclasses
import functools

import torch

from ..comm.errors import PayloadError
from ..comm.state import State
from .arguments import FederatedArguments
from .errors import RoundError
from .state import ClientUpdate, Refused


def checked(update: ClientUpdate, args: FederatedArguments) -> ClientUpdate:
    """An update that may be used, scaled down to ``clip_update_norm`` if it is larger.

    The update and each group that the strategy sends beside it (SCAFFOLD's change of the control)
    are held to the same norms, every one by itself.

    Raises:
        PayloadError: it holds NaN or infinity, or a norm is beyond ``max_update_norm``.
    """
    bounded = functools.partial(_bounded, client=update.client, args=args)
    return dataclasses.replace(
        update,
        update=bounded("update", update.update),
        extra={group: bounded(group, state) for group, state in update.extra.items()},
    )


def _bounded(what: str, state: State, client: int, args: FederatedArguments) -> State:
    norm = state_norm(state)
    if norm != norm or norm == float("inf"):
        raise PayloadError("not_finite", f"the {what} of client {client} is not finite")
    if args.max_update_norm is not None and norm > args.max_update_norm:
        raise PayloadError(
            "norm",
            f"the {what} of client {client} has norm {norm:.3g}, allowed is "
            f"{args.max_update_norm:.3g} (max_update_norm)",
        )
    if args.clip_update_norm is None or norm <= args.clip_update_norm:
        return state
    scale = args.clip_update_norm / norm
    return {n: t * scale if t.is_floating_point() else t for n, t in state.items()}


def state_norm(state: State) -> float:
    """The 2-norm of all floating-point entries."""
    floats = [t for t in state.values() if t.is_floating_point()]
    norms = [torch.linalg.vector_norm(t.float() if t.itemsize < 4 else t) for t in floats]
    return float(torch.stack(norms).double().norm()) if norms else 0.0


def require_quorum(used: int, refused: list[Refused], cohort: int, quorum: float) -> None:
    """Raise unless enough of a cohort's updates can be used.

    Raises:
        RoundError: fewer than the quorum, or all that reported were refused.
    """
    first = f": {refused[0].message}" if refused else ""
    if refused and not used:
        raise RoundError(f"all {len(refused)} updates of the round were refused{first}")
    if used < quorum * cohort:
        raise RoundError(
            f"{used} of {cohort} sampled clients sent a usable update, the quorum is {quorum:.0%}; "
            f"{len(refused)} were refused{first}; lower quorum, or find out what ails them"
        )
