"""A round's secure sum on the server, whoever carries its messages: four exchanges."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ...comm.errors import PayloadError, SecureAggregationError
from ...comm.ledger import Direction
from ...comm.payload import PayloadSize
from ...comm.schema import Schema, schema_of
from ...comm.secure.messages import Kind
from ...comm.secure.server import SecureServer
from ..arguments import FederatedArguments
from ..server.opened import OpenRound
from ..state import Outcome, Refused
from ..strategies import Strategy
from .fit import agreement_of, fixed_range
from .seal import names_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Carried:
    """What became of an exchange.

    Attributes:
        sent: clients to whom something went.
        answers: by client, what it answered in time.
        refused: of what came, that which is no answer.
    """

    sent: Collection[int]
    answers: Mapping[int, bytes]
    refused: Collection[Refused] = ()


class Carrier(Protocol):
    """Takes a round's messages to its clients and brings theirs."""

    def carry(self, wanted: Kind, data: Mapping[int, bytes]) -> Carried:
        """An exchange.

        Args:
            wanted: which message clients are asked for: ``KEYS``, ``SHARES`` or ``UNMASKING``.
            data: by client, what they are told for it; empty for ``KEYS``.
        """


@dataclass
class SecureRound:
    """The server's half of a round whose updates it sees the sum of.

        shares (keys, shares) → each client is asked to train → took (its masked update) → finish

    Attributes:
        args: the run's settings.
        strategy: the federated optimizer.
        opened: the round; its mean is in there at the end.
        agreed: what both ends know of the sum.
        refused: answers of the first exchanges of which nothing is used.
    """

    args: FederatedArguments
    strategy: Strategy
    opened: OpenRound
    refused: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        opened = self.opened
        self._schema = _schema(opened)
        self.agreed = agreement_of(
            self.args, self.strategy, opened.number, opened.cohort, self._schema
        )
        self._server = SecureServer(self.agreed)
        self._turned_away = False

    def shares(self, carrier: Carrier) -> dict[int, bytes]:
        """Let keys and shares be exchanged: for each client that is left, the others' for it.

        Raises:
            SecureAggregationError: fewer clients than the threshold are left.
        """
        server = self._server
        asked = dict.fromkeys(self.opened.cohort, b"")
        left = self._exchange(carrier, Kind.KEYS, asked, server.keys)
        asked = dict.fromkeys(left, server.all_keys())
        self._exchange(carrier, Kind.SHARES, asked, server.shares)
        return server.all_shares()

    def count(self, client: int, way: Direction, data: bytes) -> None:
        """Count a message; masked updates are counted by the run, as every update is."""
        if data:
            self.opened.updates.beside.append((client, way, PayloadSize(len(data), 0)))

    def took(self, outcome: Outcome) -> Outcome:
        """Add what a client sent; nothing else of it goes on."""
        # Nothing but bytes goes from a client to the server.
        bare = dataclasses.replace(outcome, update=None, sent=None, payload=b"")
        if outcome.refused is None:
            try:
                self._server.masked(outcome.client, outcome.payload)
            except PayloadError as error:
                refused = Refused(outcome.client, error.reason, str(error))
                bare = dataclasses.replace(bare, refused=refused)
        self._turned_away |= bare.refused is not None
        return bare

    def finish(self, carrier: Carrier) -> None:
        """Unmask the sum, and take its mean in.

        Raises:
            SecureAggregationError: fewer clients than the threshold are left.
        """
        server, opened = self._server, self.opened
        if not server.came and self._turned_away:
            return  # all were refused or failed: as in any round, the quorum decides
        asked = dict.fromkeys(server.came, server.survivors())
        self._exchange(carrier, Kind.UNMASKING, asked, server.unmasking)
        found, params = server.total(), opened.part.params
        mean = fixed_range(self.args).state(found.values, self._schema, found.weight)
        placed = {name: mean[name].to(params[name].device) for name in opened.uplink.params}
        opened.updates.take_mean(placed, found.weight, len(found.clients), found.train_loss)

    def failed(self, error: SecureAggregationError) -> list[Outcome]:
        """What a round ends in of which there is no sum; with ``quorum=0`` it changes nothing.

        Raises:
            SecureAggregationError: the same, without ``quorum=0``.
        """
        if self.args.quorum != 0:
            error.add_note("with quorum=0 such a round changes nothing, and the run goes on")
            raise error
        logger.warning("round %d changes nothing: %s", self.opened.number + 1, error)
        return [
            Outcome(client, refused=Refused(client, "unsummed", str(error)), seconds=None)
            for client in sorted(self._server.came)
        ]

    def _exchange(
        self,
        carrier: Carrier,
        wanted: Kind,
        data: Mapping[int, bytes],
        take: Callable[[int, bytes], None],
    ) -> list[int]:
        """The clients whose answers were taken."""
        carried, taken = carrier.carry(wanted, data), []
        refused = list(carried.refused)
        for client in data:
            if client in carried.sent:
                self.count(client, "downlink", data[client])
            if client not in carried.answers:
                continue
            self.count(client, "uplink", carried.answers[client])
            try:
                take(client, carried.answers[client])
                taken.append(client)
            except PayloadError as error:
                refused.append(Refused(client, error.reason, str(error)))
        for found in refused:
            if wanted is Kind.UNMASKING:  # its update is in the sum all the same
                logger.warning(
                    "round %d, client %d does not help to unmask: %s",
                    self.opened.number + 1, found.client, found.message,
                )  # fmt: skip
            else:
                self.refused.append(Outcome(found.client, refused=found, seconds=None))
        return taken


def _schema(opened: OpenRound) -> Schema:
    """Of a round's updates, in the order in which they are summed."""
    params = opened.part.params
    return schema_of({name: params[name] for name in names_of(opened.uplink.params)})
