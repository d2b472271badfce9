"""How long clients take, by a simulated clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from ..arguments import FederatedArguments
from ..data.fingerprint import shown_values
from ..errors import ArgumentsError, about
from ..random import numpy_generator

#: Every client's: by name, in order, or as a function of its name.
GivenSeconds = Mapping[Any, float] | Sequence[float] | Callable[[Any], float]


class ClientSeconds:
    """Seconds of a client's turn, transfers included.

        s_i exp(σ z),   z ~ N(0, 1) of (seed, round, client)

    Args:
        given: s_i, by name, in order, or as a function of the name.
        args: the run's settings; σ is ``client_seconds_sigma``.
        names: the clients' names.

    Raises:
        ArgumentsError: a client has none, or what it has is no time.
    """

    def __init__(self, given: GivenSeconds, args: FederatedArguments, names: Sequence[Any]) -> None:
        if isinstance(given, Mapping):
            if given.keys() != set(names):
                odd = sorted(given.keys() ^ set(names), key=str)
                raise ArgumentsError(
                    f"client_seconds must have every client's name and no other, {len(odd)} differ "
                    f"(first {odd[:3]}): the run has {list(names[:3])} and so on"
                )
        elif not callable(given) and len(given) != len(names):
            raise ArgumentsError(
                f"client_seconds has {len(given)} times for {len(names)} clients: give one a "
                "client, a mapping by name, or a function of the name"
            )
        self._seed, self._sigma = args.seed, args.client_seconds_sigma
        self._median = []
        for client, name in enumerate(names):
            with about(name):
                found = given(name) if callable(given) else None
                if not callable(given):
                    found = given[name] if isinstance(given, Mapping) else given[client]
                self._median.append(_checked(found))

    def of(self, client: int, round: int) -> float:
        """Of a client that begins in a round, counted from 0."""
        if not self._sigma:
            return self._median[client]
        z = numpy_generator(self._seed, round, client, "seconds").standard_normal()
        return self._median[client] * math.exp(self._sigma * float(z))

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run must have in common."""
        return {"client_seconds": shown_values(self._median)}


def seconds_of(
    given: GivenSeconds | None, args: FederatedArguments, names: Sequence[Any]
) -> ClientSeconds | None:
    """The times of a simulation's clients; None without.

    Raises:
        ArgumentsError: the run needs them, or they are none.
    """
    if given is not None:
        return ClientSeconds(given, args, names)
    for name in ("buffer_size", "client_seconds_sigma"):
        if getattr(args, name):
            raise ArgumentsError(
                f"{name} needs client_seconds in a simulation, where nobody is late by itself: "
                "give the trainer every client's seconds"
            )
    return None


def _checked(seconds: Any) -> float:
    if isinstance(seconds, Real) and not isinstance(seconds, bool):
        found = float(seconds)
        if math.isfinite(found) and found > 0:
            return found
    raise ArgumentsError(f"{seconds!r:.80} is no time: give seconds above 0")
