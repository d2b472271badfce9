"""A process that stays alive on a node, because Flower starts a new one for every message.

The message's own process hands the job over a Unix domain socket, as JSON and payload bytes; the
key to it lies in a folder that only the node's user can read. The worker ends when it has been idle
for long, or when the process that started Flower's (the SuperNode) is gone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...federation.errors import ArgumentsError, RoundError
from ..engine.jobs import Answer, Introduction, Job
from ..engine.node import Node, NodeSetup, client_folder

_MAIN = "from fedpara_peft.integrations.flower.worker import main; main()"
_START_S = 300.0
# Workers that this process started and never waits for; kept so that the system's records of those
# that ended can be cleared.
_STARTED: list[subprocess.Popen[bytes]] = []
_GONE = (OSError, EOFError, AuthenticationError, ValueError)


class RemoteNode:
    """A node (:class:`~..engine.node.Node`) in a process of its own, started when first needed.

    Args:
        setup: model, data and settings; its functions must be importable.
        idle_s: seconds without a message after which the process ends.
    """

    def __init__(self, setup: NodeSetup, idle_s: float) -> None:
        self._setup = setup
        self._idle_s = idle_s

    def introduce(self, client: int) -> Introduction:
        """How many examples a client has, and what this node was given."""
        found, _ = self._ask(client, {"do": "introduce"}, b"")
        return Introduction(**found)

    def train(self, client: int, job: Job) -> Answer:
        """Train a client for a round."""
        facts = asdict(job) | {"message": job.message.hex()}
        payload = facts.pop("payload")
        found, data = self._ask(client, {"do": "train", "job": facts}, payload)
        return Answer(**found, payload=data)

    def _ask(self, client: int, request: dict[str, Any], payload: bytes) -> tuple[Any, bytes]:
        folder = client_folder(self._setup.state_dir, client) / "worker"
        folder.mkdir(mode=0o700, exist_ok=True)
        program = self._program(client)
        endpoint = folder / f"{hashlib.sha256(program).hexdigest()[:16]}.json"
        with FileLock(folder / "lock"):  # one worker, one message at a time
            try:
                found, data = _exchange(endpoint, request | {"client": client}, payload)
            except _GONE:
                _start(program, endpoint)
                try:
                    found, data = _exchange(endpoint, request | {"client": client}, payload)
                except _GONE as error:
                    raise RoundError(
                        f"the node's worker ended while it was at work ({error!r}): see "
                        f"{endpoint.with_suffix('.log')}"
                    ) from None
        if "error" in found:
            raise RoundError(f"the node's worker failed: {found['error']}")
        return found, data

    def _program(self, client: int) -> bytes:
        """All that the worker is to know; another app or other settings get another worker."""
        try:
            setup = pickle.dumps(self._setup)  # from this program to its own child
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ArgumentsError(
                f"worker=True needs functions that another process can import ({error}): define "
                "model_fn, data_fn and compute_loss at the top of a module, or use worker=False"
            ) from None
        head = {"path": sys.path, "idle_s": self._idle_s, "guardian": os.getppid()}
        return json.dumps(head).encode() + b"\n" + setup


def main() -> None:
    """Serve messages; what to do comes in through the standard input."""
    endpoint = Path(sys.argv[1])
    head, _, setup = sys.stdin.buffer.read().partition(b"\n")
    facts = json.loads(head)
    sys.path[:] = facts["path"]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    node = Node(pickle.loads(setup))
    folder = tempfile.mkdtemp(prefix="fedpara-")  # a short path: sockets' may not be long
    key = secrets.token_bytes(32)
    with Listener(f"{folder}/socket", "AF_UNIX", backlog=16, authkey=key) as listener:
        facts_to_call = {"address": f"{folder}/socket", "key": key.hex(), "process": os.getpid()}
        _write_private(endpoint, facts_to_call)
        watch = _Watch(endpoint, folder, facts["guardian"], facts["idle_s"])
        while True:
            try:
                with listener.accept() as connection, watch.busy():
                    _serve(node, connection)
            except _GONE as error:
                logging.getLogger(__name__).warning("a caller was turned away: %r", error)


class _Watch:
    """Ends this process when nobody needs it any longer."""

    def __init__(self, endpoint: Path, folder: str, guardian: int, idle_s: float) -> None:
        self._endpoint, self._folder = endpoint, folder
        self._guardian, self._idle_s = guardian, idle_s
        self._lock = threading.Lock()
        self._last = time.monotonic()
        threading.Thread(target=self._run, daemon=True).start()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While this lasts the process is not idle."""
        with self._lock:
            yield
            self._last = time.monotonic()

    def _run(self) -> None:
        while _alive(self._guardian):
            time.sleep(0.5)
            if self._lock.acquire(blocking=False):
                if time.monotonic() - self._last > self._idle_s:
                    break
                self._lock.release()
        self._endpoint.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(0)  # also in the middle of training: states are written whole or not at all


def _serve(node: Node, connection: Connection) -> None:
    request, payload = json.loads(connection.recv_bytes()), connection.recv_bytes()
    found: dict[str, Any]
    data = b""
    try:
        client = int(request["client"])
        if request["do"] == "introduce":
            found = asdict(node.introduce(client))
        else:
            facts = request["job"]
            facts |= {name: tuple(facts[name]) for name in ("needed", "missed", "cohort")}
            facts["message"] = bytes.fromhex(facts["message"])
            answer = node.train(client, Job(**facts, payload=payload))
            found = asdict(answer)
            data = found.pop("payload")
    except Exception as error:
        logging.getLogger(__name__).exception("a message failed")
        found = {"error": f"{type(error).__name__}: {error}"}
    connection.send_bytes(json.dumps(found).encode())
    connection.send_bytes(data)


def _exchange(endpoint: Path, request: dict[str, Any], payload: bytes) -> tuple[Any, bytes]:
    facts = json.loads(endpoint.read_text())
    with Client(facts["address"], "AF_UNIX", authkey=bytes.fromhex(facts["key"])) as connection:
        connection.send_bytes(json.dumps(request).encode())
        connection.send_bytes(payload)
        return json.loads(connection.recv_bytes()), connection.recv_bytes()


def _start(program: bytes, endpoint: Path) -> None:
    """Start a worker and wait until it listens."""
    endpoint.unlink(missing_ok=True)
    log = endpoint.with_suffix(".log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, str(endpoint)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # it outlives the process of this message
        )
    _STARTED[:] = [process, *(former for former in _STARTED if former.poll() is None)]
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # it may have ended: its log says why
        pipe.write(program)
    end = time.monotonic() + _START_S
    while not endpoint.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RoundError(f"the node's worker did not start ({log}): {log.read_text()[-2000:]}")
        time.sleep(0.05)


def _write_private(path: Path, facts: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(facts, file)
    os.replace(partial, path)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
