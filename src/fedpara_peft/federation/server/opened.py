"""A round between its announcement and its close."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...comm.payload import PayloadSize
from ...comm.state import State
from ..late.arrivals import Arrivals
from ..state import ServerState
from .averaging import ExactAverage
from .channel import Layout, Sent
from .cohort import Cohort
from .ranks import ClientRanks, Level


@dataclass(frozen=True)
class OpenRound:
    """A round that has been announced and not yet closed.

    Attributes:
        number: rounds completed before it.
        cohort: the sampled clients, whose turns begin.
        dropped: those of them that will not report, in a simulation.
        resting: parameters that do not change in it.
        server: the server, with the downlink's new residual.
        part: the parameters of it that change.
        uplink: what they send, of all columns.
        sent: what they receive, by their rank, each with its payload where one was asked for.
        ranks: which columns each client has.
        updates: what has been taken in so far.
        exact: moves the remainders, where there are any.
        factors: by client, the factors that it ended with, and its weight; then alone.
        finish_s: when the turns that begin end, by the simulated clock; empty without seconds.
        late: whose turns end, where the round does not wait for its cohort.
    """

    number: int
    cohort: tuple[int, ...]
    dropped: tuple[int, ...]
    resting: frozenset[str]
    server: ServerState
    part: ServerState
    uplink: Layout
    sent: Mapping[Level, Sent]
    ranks: ClientRanks
    updates: Cohort
    exact: ExactAverage | None = None
    factors: dict[int, tuple[State, float]] = field(default_factory=dict)
    finish_s: Mapping[int, float] = field(default_factory=dict)
    late: Arrivals | None = None

    @property
    def ended(self) -> tuple[int, ...]:
        """The clients whose turns end in the round, as far as that is known."""
        return self.cohort if self.late is None else self.late.ended

    @property
    def awaited(self) -> int:
        """Clients that the round waits for."""
        return len(self.reporting) if self.late is None else self.late.size

    @property
    def clock_s(self) -> float:
        """The simulated time when the last turn ended."""
        if self.late is not None:
            return self.late.clock_s
        return max(self.finish_s.values(), default=self.server.clock_s)

    @property
    def reporting(self) -> list[int]:
        """The clients that train."""
        return [client for client in self.cohort if client not in self.dropped]

    def sent_to(self, client: int) -> Sent:
        """What a client of the cohort receives."""
        return self.sent[self.ranks.level(client)]

    def size_to(self, client: int, *, whole: bool = False) -> PayloadSize:
        """How long all is that such a client receives.

        Args:
            client: client index.
            whole: of one that is sent all of the remainders.
        """
        size = self.sent_to(client).size
        if self.exact is None:
            return size
        rest = self.exact.catch_up(self.server, client, whole=whole).form.size
        return PayloadSize(
            size.header_bytes + rest.header_bytes, size.tensor_bytes + rest.tensor_bytes
        )
