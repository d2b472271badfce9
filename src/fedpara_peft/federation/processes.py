"""A federation shared among processes: each lets some clients train, all see every update."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ..comm.errors import PayloadError
from .backend import Over
from .crew import Crew
from .server.opened import OpenRound
from .server.round import RoundServer
from .server.sampling import share_out
from .simulation import Simulation
from .state import Outcome, Refused


class Processes(Over[Simulation]):
    """Clients of all processes; see :class:`~.backend.Backend`.

    What travels between processes is what travels between machines: a client's payload, in bytes.

    Args:
        simulation: of this process.
        rounds: decodes and admits payloads.
        accelerator: the way between the processes.
        crew: the processes.
    """

    def __init__(
        self, simulation: Simulation, rounds: RoundServer, accelerator: Accelerator, crew: Crew
    ) -> None:
        super().__init__(simulation)
        self._rounds = rounds
        self._accelerator = accelerator
        self._crew = crew

    def outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """As :class:`~.backend.Backend` has it; the same on every process."""
        owners = share_out(opened.reporting, self.num_examples, self._crew.size)
        here = [client for client in opened.reporting if owners[client] == self._crew.index]
        mine: dict[int, Outcome] = {}

        def train() -> dict[int, Outcome]:
            mine.update((o.client, o) for o in self._below.turns(here, opened, encode=True))
            return {client: _light(outcome) for client, outcome in mine.items()}

        known = {c: o for part in self._crew.together(train) for c, o in part.items()}
        for client in sorted(owners):
            outcome = known[client]
            if outcome.update is not None:
                size = 0 if outcome.size is None else len(outcome.size)
                own = mine[client].payload if client in mine else None
                payload = self._from(owners[client], own, size)
                outcome = self._received(opened, outcome, payload)
            if outcome.keeps_state:
                self._below.store.note(client, opened.number + 1)
            yield outcome

    def _from(self, owner: int, own: bytes | None, size: int) -> bytes:
        """A payload that one process has, on every process."""
        if not size:
            return b""
        data = torch.empty(size, dtype=torch.uint8)
        if own is not None:
            data = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        here = data.to(self._accelerator.device)
        return broadcast(here, from_process=owner).cpu().numpy().tobytes()

    def _received(self, opened: OpenRound, outcome: Outcome, payload: bytes) -> Outcome:
        assert outcome.update is not None
        sent = outcome.update
        try:
            update = self._rounds.received(
                opened,
                outcome.client,
                payload,
                sent.num_examples,
                sent.train_loss,
                sent.steps,
                sent.terms,
            )
        except PayloadError as error:
            refused = Refused(outcome.client, error.reason, str(error))
            return dataclasses.replace(outcome, update=None, refused=refused)
        return dataclasses.replace(outcome, update=update)


def _light(outcome: Outcome) -> Outcome:
    """An outcome as the other processes need it: without tensors, bytes and live exceptions."""
    update, refused = outcome.update, outcome.refused
    if update is not None:
        update = dataclasses.replace(update, update={}, buffers={}, extra={})
    if refused is not None:
        refused = dataclasses.replace(refused, error=None)
    return dataclasses.replace(outcome, update=update, refused=refused, payload=b"", sent=None)
