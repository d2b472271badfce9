"""Which turns end while a round is open."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..arguments import FederatedArguments
from ..state import Flight, Outcome, Refused, ServerState


class Arrivals:
    """The clients at work in an open round, and those of them whose turns end in it.

    The server steps when K updates can be used; whoever is still at work then ends in a
    later round. Nobody is waited for in vain: a client that does not report, or whose update is
    refused, is no update, and the next one is taken.

    Args:
        server: before the round.
        args: the run's settings.

    Attributes:
        clock_s: the simulated time of the last turn that ended.
        size: updates of a step, K.
    """

    def __init__(self, server: ServerState, args: FederatedArguments) -> None:
        assert args.buffer_size is not None
        self._round = server.round
        self._max_staleness = args.max_staleness
        self._exponent = args.staleness_exponent
        self._ages: list[int] = []
        self._at_work = {flight.client: flight for flight in server.flights}
        self._ended: dict[int, Flight] = {}
        self.size = args.buffer_size
        self.clock_s = server.clock_s

    @property
    def at_work(self) -> tuple[Flight, ...]:
        """Turns that have not ended, in client order."""
        return tuple(self._at_work[client] for client in sorted(self._at_work))

    @property
    def ended(self) -> tuple[int, ...]:
        """Clients whose turns have ended in this round, in ascending order."""
        return tuple(sorted(self._ended))

    def staleness(self, client: int) -> int:
        """Server steps since the version that a client whose turn has ended began from."""
        return self._round - self._ended[client].start

    def used(self, client: int) -> float:
        """The server uses a client's update: what a late one is scaled by.

            (1 + τ)^-a      τ server steps since it began

        The divisor of the mean is not, so that a step of nothing but old updates is a small one.
        """
        self._ages.append(self.staleness(client))
        return float((1 + self._ages[-1]) ** -self._exponent)

    @property
    def ages(self) -> tuple[float, int] | tuple[None, None]:
        """Mean and maximum staleness of the updates that were used; None if none was."""
        ages = self._ages
        return (sum(ages) / len(ages), max(ages)) if ages else (None, None)

    def start(self, flight: Flight) -> None:
        """A client begins."""
        self._at_work[flight.client] = flight

    def end(self, client: int, outcome: Outcome | None) -> Outcome | None:
        """A client's turn ends.

        Args:
            client: one that is at work.
            outcome: how; None: it did not report.

        Returns:
            The outcome; an update that is too old is refused.
        """
        flight = self._at_work.pop(client)
        self._ended[client] = flight
        self.clock_s = max(self.clock_s, flight.finish_s)
        old, most = self.staleness(client), self._max_staleness
        if outcome is None or outcome.update is None or most is None or old <= most:
            return outcome
        refused = Refused(
            client, "stale",
            f"the server made {old} steps meanwhile, allowed are {most} (max_staleness)",
        )  # fmt: skip
        return dataclasses.replace(outcome, update=None, refused=refused, keeps_state=False)

    def first(self) -> Sequence[Outcome]:
        """Let turns end in the order of their times until the buffer is full; in client order.

        Who ends at the same time as another: the longest at work first, then in client order.
        """
        queue = sorted(self.at_work, key=lambda f: (f.finish_s, f.start, f.client))
        found: dict[int, Outcome] = {}
        count = 0
        for flight in queue:
            if count == self.size:
                break
            outcome = self.end(flight.client, flight.outcome)
            if outcome is not None:
                found[flight.client] = outcome
                count += outcome.update is not None
        return [found[client] for client in sorted(found)]

    def flight(self, client: int) -> Flight:
        """The turn of a client that has ended in this round."""
        return self._ended[client]
