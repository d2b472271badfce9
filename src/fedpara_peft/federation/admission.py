"""Which updates of a round are used."""

from __future__ import annotations

import dataclasses

import torch

from ..comm.errors import PayloadError
from .arguments import FederatedArguments
from .errors import RoundError
from .state import ClientUpdate, Refused


def checked(update: ClientUpdate, args: FederatedArguments) -> ClientUpdate:
    """An update that may be used, scaled down to ``clip_update_norm`` if it is larger.

    Raises:
        PayloadError: it holds NaN or infinity, or its norm is beyond ``max_update_norm``.
    """
    norm = update_norm(update)
    if norm != norm or norm == float("inf"):
        raise PayloadError("not_finite", f"the update of client {update.client} is not finite")
    if args.max_update_norm is not None and norm > args.max_update_norm:
        raise PayloadError(
            "norm",
            f"the update of client {update.client} has norm {norm:.3g}, allowed is "
            f"{args.max_update_norm:.3g} (max_update_norm)",
        )
    if args.clip_update_norm is not None and norm > args.clip_update_norm:
        scale = args.clip_update_norm / norm
        clipped = {n: t * scale if t.is_floating_point() else t for n, t in update.update.items()}
        return dataclasses.replace(update, update=clipped)
    return update


def update_norm(update: ClientUpdate) -> float:
    """The 2-norm of all floating-point entries of an update."""
    floats = [t for t in update.update.values() if t.is_floating_point()]
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
