"""A node's half of secure sums. An engine may start a process for every message, so what a client
must not tell rests between two messages in its own folder, and nowhere else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...comm.errors import PayloadError
from ...comm.schema import Schema
from ...comm.secure.client import SecureClient
from ...comm.secure.messages import Kind
from ...federation.arguments import FederatedArguments
from ...federation.folder.store import sync
from ...federation.secure.fit import agreement_of
from ...federation.secure.seal import Sealer
from ...federation.strategies import Strategy
from .jobs import Job

#: After so long the secrets of a run that was given up are removed by any other run's round.
_FORGOTTEN_S = 24 * 3600.0


class NodeSums:
    """Answers what the server asks a client for in a round of secure aggregation.

    Args:
        args: the run's settings.
        strategy: the federated optimizer.
        folder_of: a client's own folder, which nobody else may read.
        schema_of: of the updates of a round, in the order in which they are summed.

    Attributes:
        sealer: masks what the client sends, within :meth:`masking`.
    """

    def __init__(
        self,
        args: FederatedArguments,
        strategy: Strategy,
        folder_of: Callable[[int], Path],
        schema_of: Callable[[int], Schema],
    ) -> None:
        self._args = args
        self._strategy = strategy
        self._folder_of = folder_of
        self._schema_of = schema_of
        self.sealer = Sealer(args)

    def answer(self, client: int, job: Job) -> bytes:
        """The answer to any message but that for the masked update.

        Raises:
            PayloadError: the message is none of this round's, or not its time.
            SecureAggregationError: to answer would tell more than a sum of enough clients.
        """
        if job.wants == Kind.KEYS.name:
            return self._advertise(client, job)
        with self._machine(client, job) as machine:
            if job.wants == Kind.SHARES.name:
                return machine.share(job.message)
            if job.wants == Kind.UNMASKING.name:
                return machine.unmask(job.message)
            raise PayloadError("malformed", f"{job.wants!r:.40} is no message of a client")

    @contextmanager
    def masking(self, client: int, job: Job) -> Iterator[None]:
        """While this lasts the sealer masks the client's update, once.

        Raises:
            PayloadError: the message is none of this round's, or not its time.
        """
        with self._machine(client, job) as machine:
            shares, seed = {client: job.message}, self._args.dp_noise_seed
            self.sealer.begin(machine.agreed, {client: machine}, shares, seed)
            yield

    def _advertise(self, client: int, job: Job) -> bytes:
        """Begin a round with secrets of its own; what is left of a former one goes."""
        schema = self._schema_of(job.round)
        agreed = agreement_of(self._args, self._strategy, job.round, job.cohort, schema)
        machine, secrets = SecureClient(agreed, client), _Secrets(self._folder_of(client), job.run)
        secrets.clear()
        keys = machine.advertise()
        secrets.put({"round": job.round, "cohort": job.cohort}, machine.saved())
        return keys

    @contextmanager
    def _machine(self, client: int, job: Job) -> Iterator[SecureClient]:
        """A client's machine, which no other message finds meanwhile.

        Afterwards it is put back as it then is, before any answer leaves. A process that is killed
        in between takes the secrets with it: its client has dropped out of the round.
        """
        secrets = _Secrets(self._folder_of(client), job.run)
        facts, data = secrets.take()
        machine: SecureClient | None = None
        try:
            if facts["round"] != job.round:
                raise PayloadError(
                    "stale", f"it is of round {job.round + 1}, the keys are of {facts['round'] + 1}"
                )
            schema, cohort = self._schema_of(job.round), facts["cohort"]
            agreed = agreement_of(self._args, self._strategy, job.round, cohort, schema)
            machine = SecureClient.restored(agreed, client, data)
            yield machine
        finally:
            if machine is None or not machine.is_done:
                secrets.put(facts, data if machine is None else machine.saved())


class _Secrets:
    """What a client must not tell, in one file that only the node's user can read.

    Args:
        folder: the client's own.
        run: the run's name.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder
        self._file = folder / f"secure-{run}.json"

    def put(self, facts: dict[str, Any], data: bytes) -> None:
        """Write the file, whole or not at all."""
        partial = self._file.with_suffix(".partial")
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w") as file:
            json.dump({**facts, "machine": data.decode()}, file)
        os.replace(partial, self._file)

    def take(self) -> tuple[dict[str, Any], bytes]:
        """Read the file and remove it; of several that try one gets it.

        Raises:
            PayloadError: there is none.
        """
        taken = self._file.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}.taken")
        try:
            os.rename(self._file, taken)
        except FileNotFoundError:
            raise PayloadError(
                "stale",
                "the client has no secrets of this round: it is over, another message is at work, "
                "or it never began here",
            ) from None
        facts = json.loads(taken.read_text())
        taken.unlink()
        sync(self._folder)  # a machine that goes down must not find it again
        return facts, facts.pop("machine").encode()

    def clear(self) -> None:
        """Remove what is left of former rounds, and of runs that were given up."""
        for path in self._folder.glob("secure-*"):
            with suppress(FileNotFoundError):
                old = time.time() - path.stat().st_mtime > _FORGOTTEN_S
                if old or path.name.startswith(self._file.stem):
                    path.unlink()
