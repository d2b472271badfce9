"""Which updates of a round are used, and what of a client is worth keeping."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping

import torch

from ...comm.errors import PayloadError
from ...comm.payload import is_finite
from ...comm.schema import schema_of
from ...comm.state import State
from ...maths.precision import wide
from ..arguments import FederatedArguments
from ..errors import RoundError
from ..state import ClientState, ClientUpdate, Refused

logger = logging.getLogger(__name__)


def checked(
    update: ClientUpdate, args: FederatedArguments, clip_norm: float | None = None
) -> ClientUpdate:
    """An update that may be used, scaled down to ``clip_update_norm`` if it is larger.

    The update and each group that the strategy sends beside it (SCAFFOLD's change of the control)
    are held to the same norms, every one by itself. Norms are of parameters: buffers need only be
    finite.

    Args:
        update: a client's, decoded.
        args: the run's settings.
        clip_norm: the round's in place of ``clip_update_norm``, where it follows updates' norms.

    Raises:
        PayloadError: it holds NaN or infinity, or a norm is beyond ``max_update_norm``.
    """
    require_finite(update)
    clip = args.clip_update_norm if clip_norm is None else clip_norm
    if args.noise_mode == "local":  # it was clipped before its noise, which is not clipped
        clip = None
    bounded = functools.partial(_bounded, most=args.max_update_norm, clip=clip)
    used = bounded("update", update.update)
    return dataclasses.replace(
        update,
        update=used,
        clipped=used is not update.update,
        extra={group: bounded(group, state) for group, state in update.extra.items()},
    )


def require_finite(update: ClientUpdate) -> None:
    """Raise unless all of an update is finite.

    Raises:
        PayloadError: it holds NaN or infinity.
    """
    _require_finite(
        {"update": update.update, "state of the buffers": update.buffers, **update.extra}
    )


def checked_state(state: ClientState) -> ClientState:
    """What a client may keep: NaN would meet it again in every round.

    Raises:
        PayloadError: it holds NaN or infinity.
    """
    _require_finite(_parts(state))
    return state


def usable_state(
    state: ClientState | None, local: State, shared: State, name: object
) -> ClientState | None:
    """What a client kept, if it is whole; None, so that it starts anew, if it is not.

    Args:
        state: as it was stored.
        local: the model's tensors of local scope.
        shared: its communicated tensors.
        name: the client's, for the log.
    """
    if state is None:
        return None
    parts = _parts(state)
    found = _not_finite(parts)
    if schema_of(parts.pop(_LOCAL)) != schema_of(local):
        found = f"the {_LOCAL} is not this model's"
    for what, part in parts.items():
        if what.startswith(_OPTIMIZER):  # whose shapes are its own affair
            if any(n not in shared and n not in local for n in part):
                found = f"the {what} is not of this model's parameters"
        elif any(n not in shared or t.shape != shared[n].shape for n, t in part.items()):
            found = f"the {what} is not of this model's parameters"
    if found:
        logger.warning("client %s starts anew: of what it kept, %s", name, found)
    return None if found else state


_LOCAL, _OPTIMIZER = "local part", "optimizer's "


def _parts(state: ClientState) -> dict[str, State]:
    groups = {f"kept {group}": kept for group, kept in state.strategy.items()}
    optimizer = {f"{_OPTIMIZER}{part}": kept for part, kept in state.optimizer.items()}
    whole = {"residual": state.residual, "remainders": state.remainders}
    return {_LOCAL: state.local, **groups, **whole, **optimizer}


def _require_finite(parts: Mapping[str, State]) -> None:
    if found := _not_finite(parts):
        raise PayloadError("not_finite", f"{found}: lower learning_rate or set max_grad_norm")


def _not_finite(parts: Mapping[str, State]) -> str | None:
    """The first part that holds NaN or infinity, and where."""
    bad = ((what, n) for what, s in parts.items() for n, t in s.items() if not is_finite(t))
    return next((f"the {what} is not finite, first {name}" for what, name in bad), None)


def _bounded(what: str, state: State, most: float | None, clip: float | None) -> State:
    if most is None and clip is None:
        return state
    norm = state_norm(state)
    if most is not None and norm > most:
        raise PayloadError(
            "norm",
            f"the {what} has norm {norm:.3g}, allowed is {most:.3g} (max_update_norm)",
        )
    if clip is None or norm <= clip:
        return state
    return {n: t * (clip / norm) for n, t in state.items()}


def state_norm(state: State) -> float:
    """The 2-norm of all entries, which are floating-point or complex."""
    # float32 at least: a sum of squares leaves float16 early.
    parts = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in state.values()]
    norms = [wide(torch.linalg.vector_norm(part)) for part in parts]
    return float(torch.stack(norms).norm()) if norms else 0.0


def require_quorum(used: int, refused: list[Refused], cohort: int, quorum: float | None) -> None:
    """Raise unless enough of a cohort's updates can be used.

    A quorum of 0 asks for none: a round without a usable update changes nothing. None asks for one,
    where any was sent: a run in which everybody diverges had better stop.

    Raises:
        RoundError: fewer than the quorum.
    """
    if quorum is None and refused and not used:
        raise RoundError(
            f"all {len(refused)} updates of the round were refused ({refused[0].message}); with "
            "quorum=0 the run would go on"
        )
    if used >= (quorum or 0.0) * cohort:
        if not used:
            logger.warning("no update of the round can be used: the global model stays as it is")
        return
    first = f" ({refused[0].message})" if refused else ""
    raise RoundError(
        f"{used} of {cohort} sampled clients sent a usable update, the quorum is {quorum:.0%}; "
        f"{len(refused)} were refused{first}; lower quorum, or see to what they were refused for"
    )
