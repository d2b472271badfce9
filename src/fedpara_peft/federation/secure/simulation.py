"""A simulated federation whose server adds masked updates up: four exchanges a round."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from ...comm.errors import SecureAggregationError
from ...comm.secure.client import SecureClient
from ...comm.secure.messages import Kind
from ..arguments import FederatedArguments
from ..backend import Over
from ..random import numpy_generator
from ..server.opened import OpenRound
from ..simulation import Simulation
from ..state import Outcome
from ..strategies import Strategy
from .round import Carried, SecureRound
from .seal import Sealer

#: How far a client that does not report comes: it sends no keys, no shares, or no update.
_DROP_OUT_STAGES = 3


class SecureSimulation(Over[Simulation]):
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
        secure = SecureRound(self._args, self._strategy, opened)
        try:
            yield from self._summed(opened, secure)
        except SecureAggregationError as error:
            yield from secure.failed(error)
            self._below.rollback(opened.number)

    def _summed(self, opened: OpenRound, secure: SecureRound) -> Iterator[Outcome]:
        machines = {client: SecureClient(secure.agreed, client) for client in opened.cohort}
        clients = _Clients(self, opened, machines)
        shares = secure.shares(clients)
        for client, data in shares.items():
            secure.count(client, "downlink", self._passes(client, data))
        self._sealer.begin(secure.agreed, machines, shares, opened.server.noise_seed)
        for outcome in self._below.turns(opened.reporting, opened):
            if outcome.payload:
                passed = self._passes(outcome.client, outcome.payload)
                outcome = dataclasses.replace(outcome, payload=passed)
            yield secure.took(outcome)
        secure.finish(clients)

    def _passes(self, client: int, data: bytes) -> bytes:
        """The link: all that passes between client and server, either way."""
        return data

    def last_stages(self, opened: OpenRound) -> dict[int, int]:
        """How far each client of a cohort comes: to the end, or to one of the stages before."""
        found = dict.fromkeys(opened.cohort, _DROP_OUT_STAGES)
        for client in opened.dropped:
            drawn = numpy_generator(self._args.seed, opened.number, client, "drop-out stage")
            found[client] = int(drawn.integers(_DROP_OUT_STAGES))
        return found

    def gone(self, came: Collection[int], round: int) -> set[int]:
        """The clients that do not help to unmask."""
        args = self._args
        draws = {c: numpy_generator(args.seed, round, c, "unmask drop-out").random() for c in came}
        return {c for c, drawn in draws.items() if drawn < args.unmask_drop_out_probability}


class _Clients:
    """Machines of all clients; see :class:`~.round.Carrier`.

    Args:
        link: what drops out, and what messages pass through.
        opened: the round.
        machines: by client.
    """

    def __init__(
        self, link: SecureSimulation, opened: OpenRound, machines: Mapping[int, SecureClient]
    ) -> None:
        self._link = link
        self._round = opened.number
        self._machines = machines
        self._last = link.last_stages(opened)

    def carry(self, wanted: Kind, data: Mapping[int, bytes]) -> Carried:
        """Let those answer that have not dropped out."""
        if wanted is Kind.UNMASKING:
            silent = self._link.gone(data, self._round)
        else:
            needed = {Kind.KEYS: 1, Kind.SHARES: 2}[wanted]
            silent = {client for client in data if self._last[client] < needed}
        answers = {
            client: self._link._passes(client, self._answer(wanted, client, text))
            for client, text in data.items()
            if client not in silent
        }
        return Carried(data.keys(), answers)

    def _answer(self, wanted: Kind, client: int, data: bytes) -> bytes:
        machine = self._machines[client]
        if wanted is Kind.KEYS:
            return machine.advertise()
        passed = self._link._passes(client, data)
        return machine.share(passed) if wanted is Kind.SHARES else machine.unmask(passed)
