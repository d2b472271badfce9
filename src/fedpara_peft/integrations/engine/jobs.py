"""What a server and its nodes tell each other, whichever engine carries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """A round as a client sees it.

    Attributes:
        run: the run's own name; a client's states of several runs do not mix.
        round: rounds completed.
        kept: the version of the client's state that goes with the server's: the last round in which
            its update was used. What the client learnt after it is forgotten.
        needed: rounds to which the server may return.
        payload: the broadcast, and behind it what the client has missed of the remainders;
            empty where no training is asked for.
        missed: how to read that, with ``exact_average``: the numbers of
            :class:`~fedpara_peft.federation.server.averaging.exact.CatchUp`.
        clip_norm: what its update will be clipped to, where that follows the updates' norms.
        wants: with secure aggregation the message that is asked for, as
            :class:`~fedpara_peft.comm.secure.messages.Kind` has it; empty: an update in the clear.
        cohort: the round's clients, with the first such message.
        message: what the client is told for it.
    """

    run: str
    round: int
    kept: int
    needed: tuple[int, ...]
    payload: bytes
    missed: tuple[int, ...] = ()
    clip_norm: float | None = None
    wants: str = ""
    cohort: tuple[int, ...] = ()
    message: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What a client sends.

    Attributes:
        round: rounds completed before it.
        num_examples: its examples.
        train_loss: mean loss over its local steps.
        payload: its update, or the message that was asked for; empty if there is none.
        steps: how it trained, where the strategy asks for it: the fields of
            :class:`~fedpara_peft.federation.state.LocalSteps`, without a weight that is not known.
        terms: of how many terms its losses were the means, where clients weigh so much.
        reason: why there is none.
        message: what was found, and what helps.
    """

    round: int
    num_examples: int = 0
    train_loss: float = 0.0
    payload: bytes = b""
    steps: tuple[float, ...] = ()
    terms: float | None = None
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself.

    Attributes:
        num_examples: its client's.
        facts: what its app was given, by name.
    """

    num_examples: int
    facts: Mapping[str, Any]
