"""What the server makes of nodes' answers, whichever engine carried them."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from ...comm.errors import PayloadError, Refusal
from ...comm.payload import Payload, PayloadSize
from ...federation.errors import AgreementError, ResumeError, RoundError
from ...federation.folder.history import History
from ...federation.server.opened import OpenRound
from ...federation.server.round import RoundServer
from ...federation.state import ClientUpdate, LocalSteps, Outcome, Refused, RoundReport
from .jobs import Answer

M = TypeVar("M")

#: What reading a message may raise of which another made every part as it liked.
UNREADABLE = (
    AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError
)  # fmt: skip

#: Refusals of what came beside an answer.
_BESIDE = ("duplicate",)


@dataclass(frozen=True)
class Answers:
    """What nodes answered in time.

    Attributes:
        answers: by client; what could not be read is an error.
        beside: what came beside them.
    """

    answers: Mapping[int, Answer | PayloadError]
    beside: Sequence[Refused] = ()


def read(parse: Callable[[M], Answer], message: M) -> Answer | PayloadError:
    """An answer, or why it is none.

    Args:
        parse: the engine's, raises a :class:`~fedpara_peft.comm.errors.PayloadError`.
        message: what came.
    """
    try:
        return parse(message)
    except PayloadError as error:
        return error


def outcome_of(rounds: RoundServer, opened: OpenRound, client: int, answer: Answer) -> Outcome:
    """What a client sent, used or refused by name.

    Args:
        rounds: decodes and admits payloads.
        opened: the round that it should answer.
        client: who answers.
        answer: what came.
    """
    size = None
    try:
        if answer.reason:
            raise PayloadError(refusal(answer.reason), f"its node says {answer.message!r:.500}")
        size = _size(answer.payload)
        if answer.round != opened.number:
            raise PayloadError(
                "stale", f"it answers round {answer.round + 1}, this is {opened.number + 1}"
            )
        update: ClientUpdate = rounds.received(
            opened, client, answer.payload, answer.num_examples, answer.train_loss,
            LocalSteps(int(answer.steps[0]), *answer.steps[1:]) if answer.steps else None,
            answer.terms,
        )  # fmt: skip
    except PayloadError as error:
        return refused(client, error, size)
    return Outcome(client, size, update, seconds=None)


def refused(client: int, error: PayloadError, size: PayloadSize | None = None) -> Outcome:
    """A client of whom nothing can be used."""
    return Outcome(client, size, refused=Refused(client, error.reason, str(error)), seconds=None)


def refusal(reason: str) -> Refusal:
    """A reason that came from elsewhere, if it is one."""
    return reason if reason in get_args(Refusal) else "malformed"  # type: ignore[return-value]


def count(value: Any) -> int:
    """A number of things, as it came over the wire.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def as_bytes(value: Any) -> bytes:
    """Bytes, as they came over the wire.

    Raises:
        TypeError: they are none.
    """
    if not isinstance(value, bytes):
        raise TypeError("the payload is not bytes")
    return value


def positive(value: Any) -> float | None:
    """A clipping norm or a number of terms, as it came over the wire; None: it is not told.

    Raises:
        ValueError: it is no size.
    """
    if value is None:
        return None
    found = float(value)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"{value!r:.40} is neither a norm nor a count")
    return found


def steps(values: Any) -> tuple[float, ...]:
    """Count, learning rate and weight of a client's steps, as far as they may be used.

    Raises:
        ValueError: they are none.
    """
    found = tuple(float(value) for value in values)
    if found and (len(found) not in (2, 3) or not all(math.isfinite(v) and v > 0 for v in found)):
        raise ValueError(f"{values!r:.80} are no steps")
    return found


def malformed(what: str, error: Exception) -> PayloadError:
    """A message that is not what it should be."""
    found = f"{type(error).__name__} {error!s:.100}"
    return PayloadError("malformed", f"not an {what} ({found}): run one version on both ends")


def used_last(history: History | Sequence[RoundReport]) -> dict[int, int]:
    """By client, the last round in which its update was used: the version of its state."""
    used: dict[int, int] = {}
    for report in history:
        # A client whose second answer was refused took part all the same.
        missing = {*report.dropped, *(c for c, r in report.refused if r not in _BESIDE)}
        used.update({c: report.round for c in report.cohort if c not in missing})
    return used


def run_name(file: Path, completed: int, logger: logging.Logger) -> str:
    """The name under which nodes keep their clients' states of this run.

    Args:
        file: where it is kept; written at the beginning of a run.
        completed: rounds of the run so far.
        logger: where to tell that a run goes on.

    Raises:
        ResumeError: the checkpoint is of a run in one place.
    """
    if not completed:
        name = secrets.token_hex(8)
        file.write_text(name + "\n")
        return name
    if not file.exists():
        raise ResumeError(
            f"{file.parent} holds checkpoints, but no {file.name}: they are of a run in "
            "one place; take another output_dir"
        )
    logger.info("continuing after round %d", completed)
    return file.read_text().strip()


def check_came(
    missing: Sequence[int],
    unlike: Mapping[int, str],
    num_clients: int,
    seconds: float,
    sampling: str,
    logger: logging.Logger,
) -> None:
    """Whether a run can start without these clients.

    Args:
        missing: in ascending order.
        unlike: how what a node was given differs, of those where it does.
        num_clients: the population.
        seconds: how long they were waited for.
        sampling: the run's ``client_sampling``.
        logger: where to tell who is missing.

    Raises:
        AgreementError: those that came were given another run.
        RoundError: no node came in time, or too few to sample by their examples.
    """
    if not missing:
        return
    nobody = len(missing) == num_clients
    if nobody and unlike:
        raise AgreementError(
            "every node was given another run than the server, first "
            f"{next(iter(unlike.values()))}: start them with the same app"
        )
    if nobody or sampling == "weighted":
        raise RoundError(
            f"{len(missing)} of {num_clients} clients did not come within "
            f"{seconds:g} s, first {list(missing[:5])}: start their nodes, raise "
            "deadline_s, or use client_sampling='uniform'"
        )
    logger.warning("starting without clients %s", list(missing))


def _size(payload: bytes) -> PayloadSize:
    """Length by parts, also of bytes that are no payload."""
    header = min(Payload(payload).size.header_bytes, len(payload))
    return PayloadSize(header, len(payload) - header)
