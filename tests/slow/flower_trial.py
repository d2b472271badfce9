"""A federation of real processes on this machine, to do harm to: SuperLink, three nodes, TLS."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from safetensors.torch import load_file

from fedpara_peft import FederatedTrainer, History, accuracy
from fedpara_peft.federation.folder.store import DiskStore

ROOT = Path(__file__).parents[2]
EXAMPLE, APP = ROOT / "examples" / "flower", ROOT / "benchmarks" / "flower_app"
PATHS = [str(EXAMPLE), str(APP)]
sys.path[:0] = PATHS

from bench_app import faulty  # noqa: E402
from digits_app import task  # noqa: E402
from federation import NUM_CLIENTS, Federation, free_port  # noqa: E402

DEADLINE_S = 120  # of a round
LIMIT_S = 600  # of anything that is waited for


class Trial:
    """One case: a federation, one run on it, and what is seen of both.

    Attributes:
        nodes: the SuperNodes' processes, by client.
        seen: what the case adds to its row.
        app: the module of the benchmarks' app that runs.
        worker: whether nodes keep a worker: where one might be left behind.
    """

    def __init__(self, folder: Path, rounds: int, app: str = "faulty", worker: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.server, self.rounds = folder, folder / "server", rounds
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.seen: list[str] = []
        self.app, self.worker = app, worker
        python_path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
        self.federation = Federation(folder, PYTHONPATH=python_path, OMP_NUM_THREADS="1")

    def start(self, *, address: str = "", faults: dict[int, dict[str, Any]] | None = None) -> None:
        """Start the SuperLink and the nodes, and the run."""
        self.superlink = self.start_superlink()
        for client in range(NUM_CLIENTS):
            self.federation.register(client)
            self.start_node(client, address=address, **(faults or {}).get(client, {}))
        self.start_run()

    def start_superlink(self) -> subprocess.Popen[bytes]:
        """Its database is on disk: it knows its nodes when it is started again."""
        return self.federation.superlink("--database", str(self.folder / "superlink.db"))

    def start_node(self, client: int, **more: Any) -> None:
        """Start a client's SuperNode, perhaps not for the first time."""
        self.nodes[client] = self.federation.node(client, **more)

    def start_run(self) -> None:
        """Start ``flwr run``, perhaps not for the first time."""
        config = {
            "app": self.app,
            "worker": self.worker,
            "num-rounds": self.rounds,
            "output-dir": str(self.server),
            "deadline-s": float(DEADLINE_S),
        }
        self.flwr_run = self.federation.start(
            "run", "flwr", *self.federation.run_arguments(APP, **config)
        )

    def wait_for_round(self, number: int) -> None:
        """Wait until a round is over."""
        wait(lambda: (self.server / f"checkpoint-{number}").is_dir(), f"round {number}", self)

    def finish(self) -> None:
        """Wait for the end of the run."""
        wait(lambda: self.flwr_run.poll() is not None, "the end of the run", self)

    def log(self, name: str = "run") -> str:
        """What a program said; ``run`` is the server's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")


def wait(there: Callable[[], object], what: str, trial: Trial) -> None:
    end = time.monotonic() + LIMIT_S
    while not there():
        if time.monotonic() > end or (what.startswith("round") and trial.flwr_run.poll()):
            raise TimeoutError(f"{what} did not come: {trial.log()[-1500:]}")
        time.sleep(0.1)


# Killing.


def killed(process: subprocess.Popen[bytes], folder: Path | None = None) -> list[psutil.Process]:
    """Kill a process, and only it; it, its descendants, and the worker that has this folder."""
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    if folder:
        family += [p for p in psutil.process_iter() if f"{folder}/" in " ".join(told(p))]
    process.send_signal(signal.SIGKILL)
    process.wait()
    return family


def told(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def alive(family: list[psutil.Process]) -> int:
    return sum(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)


# What nodes keep, and what crossed the wire.


def kept(trial: Trial, client: int, version: int) -> dict[str, bytes]:
    """The local half on a node's disk as it was after a round; empty if there is none."""
    for folder in (trial.folder / f"node-{client}" / f"client-{client}").glob("run-*"):
        store = DiskStore(folder)
        store.rollback(version, owner=False)
        if state := store.get(client):
            return bits(state.local)
    return {}


def bits(tensors: Any) -> dict[str, bytes]:
    return {name: t.contiguous().numpy().tobytes() for name, t in tensors.items()}


@contextlib.contextmanager
def relay(trial: Trial) -> Iterator[tuple[str, bytearray]]:
    """Stand between the nodes and the SuperLink, with the server's own certificate, and listen."""
    secrets, wire, lock = trial.federation.secrets, bytearray(), threading.Lock()
    inner = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inner.load_cert_chain(secrets / "server.pem", secrets / "server.key")
    outer = ssl.create_default_context(cafile=str(secrets / "ca.pem"))
    port = free_port()
    host, _, target = trial.federation.address.rpartition(":")

    def hang_up(*ends: ssl.SSLSocket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def pump(source: ssl.SSLSocket, sink: ssl.SSLSocket) -> None:
        heard = bytearray()  # joined at the end: a payload's parts stay together
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                heard += data
                sink.sendall(data)
        hang_up(source, sink)
        with lock:
            wire.extend(heard)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                connections.append(threading.Thread(target=connect, args=(near,), daemon=True))
                connections[-1].start()

    def connect(near: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            opened.enter_context(near)
            far = opened.enter_context(socket.create_connection((host, int(target))))
            far = opened.enter_context(outer.wrap_socket(far, server_hostname="localhost"))
            ends = opened.enter_context(inner.wrap_socket(near, server_side=True)), far
            every.extend(ends)
            back = threading.Thread(target=pump, args=ends[::-1], daemon=True)
            back.start()
            pump(*ends)
            back.join()

    connections: list[threading.Thread] = []
    every: list[ssl.SSLSocket] = []
    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{port}", wire
    hang_up(*every)
    for connection in connections:
        connection.join(DEADLINE_S)


def crossed(trial: Trial, wire: bytes) -> str:
    """Look for every node's local half, round by round, in what was sent; and for the shared."""
    shared = load_file(trial.server / "checkpoint-1" / "server.safetensors")
    control = sum(len(t) > 64 and t in wire for t in bits(shared).values())
    windows = {wire[i : i + 8] for i in range(len(wire) - 7)}
    names, looked, found = set(), 0, 0
    for client in range(NUM_CLIENTS):
        for version in range(1, trial.rounds + 1):
            local = kept(trial, client, version)
            names |= local.keys()
            for values in local.values():
                parts = [values[i : i + 8] for i in range(0, len(values) - 7, 8)]
                parts = [part for part in parts if len(set(part)) > 2]  # not zeros, which all have
                looked += len(parts)
                found += sum(part in windows for part in parts)
    spoken = sum(name.encode() in wire for name in names)
    assert control  # what is shared is found, so what is not would be
    assert looked
    assert (found, spoken) == (0, 0)
    return (
        f"{len(wire) / 1e6:.1f} MB heard between nodes and SuperLink: {control} shared tensors of "
        f"round 1 found in it, none of {looked:,} pairs of numbers of the local halves, "
        f"none of their {len(names)} names"
    )


# What came out.


def simulated(folder: Path, rounds: int, missing: dict[int, set[int]]) -> FederatedTrainer:
    """The run in one process; updates that are missing, by round, never came."""
    args = faulty.arguments({"output-dir": str(folder), "num-rounds": rounds})
    trainer = FederatedTrainer(
        task.model_fn(), args, task.clients(), task.test_set(), compute_metrics=accuracy
    )
    lost = lambda cohort, _, __, number: sorted(missing.get(number + 1, ()))  # noqa: E731
    with mock.patch("fedpara_peft.federation.server.round.drop_outs", lost):
        trainer.train()
    return trainer


def same_bits(trial: Trial, history: History) -> tuple[bool, bool]:
    """Whether the global model, and all that clients learnt for themselves, is the simulation's."""
    missing = {r.round: {*r.dropped, *(c for c, _ in r.refused)} for r in history}
    with tempfile.TemporaryDirectory() as folder:
        trainer = simulated(Path(folder), len(history), missing)
        name = f"checkpoint-{len(history)}/server.safetensors"
        shared = bits(load_file(trial.server / name)) == bits(load_file(Path(folder) / name))
        local = True
        for client in range(NUM_CLIENTS):
            used = [r.round for r in history if client not in missing[r.round]]
            expected = trainer.client_state(client)
            found = kept(trial, client, used[-1] if used else 0)
            local &= found == (bits(expected.local) if expected else {})
    return shared, local


def plain(text: str) -> list[str]:
    """Lines of a log without colours."""
    return [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
