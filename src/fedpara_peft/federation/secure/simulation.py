"""A simulated federation whose server adds masked updates up: four exchanges a round."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

from ...comm.errors import SecureAggregationError
from ...comm.ledger import Direction
from ...comm.payload import PayloadSize
from ...comm.schema import Schema, schema_of
from ...comm.secure.agreement import Summed
from ...comm.secure.client import SecureClient
from ...comm.secure.server import SecureServer
from ..arguments import FederatedArguments
from ..random import numpy_generator
from ..server.opened import OpenRound
from ..simulation import OnSimulation, Simulation
from ..state import Outcome
from ..strategies import Strategy
from .fit import agreement_of, fixed_range
from .seal import Sealer, names_of

logger = logging.getLogger(__name__)

#: How far a client that does not report comes: it sends no keys, no shares, or no update.
_DROP_OUT_STAGES = 3


class SecureSimulation(OnSimulation):
    """Clients of this process and what passes between them and the server, in bytes.

    See :class:`~..backend.Backend`. Clients that drop out by ``drop_out_probability`` do so before
    they send keys, shares or the masked update, each as likely as the others; none of theirs is in
    the sum. Those that drop out by ``unmask_drop_out_probability`` have sent it, and it is.

    Args:
        args: the run's settings.
        strategy: the federated optimizer.
        simulation: lets clients train.
        sealer: masks what they send; the simulation's turns have it.
    """

    def __init__(
        self,
        args: FederatedArguments,
        strategy: Strategy,
        simulation: Simulation,
        sealer: Sealer,
    ) -> None:
        self._args = args
        self._strategy = strategy
        super().__init__(simulation)
        self._sealer = sealer

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """As :class:`~..backend.Backend` has it; the cohort's mean is in the round afterwards.

        Raises:
            SecureAggregationError: fewer clients than the threshold stayed; with ``quorum=0`` the
                round changes nothing instead.
        """
        if not opened.reporting:
            return
        try:
            yield from self._summed(opened)
        except SecureAggregationError as error:
            if self._args.quorum != 0:
                error.add_note("with quorum=0 such a round changes nothing, and the run goes on")
                raise
            logger.warning("round %d changes nothing: %s", opened.number + 1, error)
            self._simulation.rollback(opened.number)

    def _summed(self, opened: OpenRound) -> Iterator[Outcome]:
        agreed = agreement_of(
            self._args, self._strategy, opened.number, opened.cohort, _schema(opened)
        )
        server = SecureServer(agreed)
        machines = {client: SecureClient(agreed, client) for client in opened.cohort}
        last = self._last_stages(opened)
        for client in opened.cohort:
            if last[client] > 0:
                server.keys(client, self._up(opened, client, machines[client].advertise()))
        keys = server.all_keys()
        for client in opened.cohort:
            if last[client] > 0:
                self._down(opened, client, keys)
            if last[client] > 1:
                server.shares(client, self._up(opened, client, machines[client].share(keys)))
        shares = server.all_shares()
        for client, data in shares.items():
            self._down(opened, client, data)
        self._sealer.begin(agreed, machines, shares)
        for outcome in self._simulation.turns(opened.reporting, opened):
            if outcome.update is not None:
                # Counted by the run, as every update is.
                server.masked(outcome.client, self._passes(outcome.client, outcome.payload))
            # Nothing but bytes goes from a client to the server.
            yield dataclasses.replace(outcome, update=None, sent=None, payload=b"")
        if not server.came:  # all were refused or failed: as in any round, the quorum decides
            return
        survivors = server.survivors()
        gone = self._gone(server.came, opened.number)
        for client in server.came:
            self._down(opened, client, survivors)
            if client not in gone:
                answer = machines[client].unmask(survivors)
                server.unmasking(client, self._up(opened, client, answer))
        self._take_in(opened, server.total())

    def _take_in(self, opened: OpenRound, found: Summed) -> None:
        params = opened.part.params
        mean = fixed_range(self._args).state(found.values, _schema(opened), found.weight)
        placed = {name: mean[name].to(params[name].device) for name in opened.uplink.params}
        opened.updates.take_mean(placed, found.weight, len(found.clients), found.train_loss)

    def _up(self, opened: OpenRound, client: int, data: bytes) -> bytes:
        return self._counted(opened, client, "uplink", data)

    def _down(self, opened: OpenRound, client: int, data: bytes) -> bytes:
        return self._counted(opened, client, "downlink", data)

    def _counted(self, opened: OpenRound, client: int, way: Direction, data: bytes) -> bytes:
        opened.updates.beside.append((client, way, PayloadSize(len(data), 0)))
        return self._passes(client, data)

    def _passes(self, client: int, data: bytes) -> bytes:
        """The link: all that passes between client and server, either way."""
        return data

    def _last_stages(self, opened: OpenRound) -> dict[int, int]:
        """How far each client of a cohort comes: to the end, or to one of the stages before."""
        found = dict.fromkeys(opened.cohort, _DROP_OUT_STAGES)
        for client in opened.dropped:
            drawn = numpy_generator(self._args.seed, opened.number, client, "drop-out stage")
            found[client] = int(drawn.integers(_DROP_OUT_STAGES))
        return found

    def _gone(self, came: Sequence[int], round: int) -> set[int]:
        """The clients that do not help to unmask."""
        args = self._args
        draws = {c: numpy_generator(args.seed, round, c, "unmask drop-out").random() for c in came}
        return {c for c, drawn in draws.items() if drawn < args.unmask_drop_out_probability}


def _schema(opened: OpenRound) -> Schema:
    """Of a round's updates, in the order in which they are summed."""
    params = opened.part.params
    return schema_of({name: params[name] for name in names_of(opened.uplink.params)})
