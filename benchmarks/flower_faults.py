"""What a federation of real processes does when things go wrong, on Flower over TLS.

    python benchmarks/flower_faults.py [--resume] [--output_dir outputs/flower_faults]

Every case starts a SuperLink and three SuperNodes with keys on loopback and runs the digits app of
examples/flower (pFedPara, int8 uplink, error feedback) on them. Afterwards
the global model and what each node keeps are compared, bit for bit, with a simulation in which the
updates that were lost or refused never came. Takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from report import table, write
from safetensors.torch import load_file

from fedpara_peft import FederatedTrainer, History, accuracy
from fedpara_peft.federation.folder.store import DiskStore

HERE = Path(__file__).parent
EXAMPLE, APP = HERE.parent / "examples" / "flower", HERE / "flower_app"
PATHS = [str(EXAMPLE), str(APP)]
sys.path[:0] = PATHS

from bench_app import faulty  # noqa: E402
from digits_app import task  # noqa: E402
from federation import NUM_CLIENTS, Federation, free_port, tool  # noqa: E402

DEADLINE_S = 120  # of a round
LIMIT_S = 600  # of anything that is waited for


class Trial:
    """One case: a federation, one run on it, and what is seen of both.

    Attributes:
        nodes: the SuperNodes' processes, by client.
        seen: what the case adds to its row.
        worker: whether nodes keep a worker: where one might be left behind.
    """

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.server, self.rounds = folder, folder / "server", rounds
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.seen: list[str] = []
        self.worker = 0
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
            "app": "faulty",
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


# Cases. Each starts what it needs, does its harm, and waits for the end.


def nothing_wrong(trial: Trial) -> None:
    trial.worker = 1
    with relay(trial) as (address, wire):
        trial.start(address=address)
        trial.finish()
        trial.seen.append(crossed(trial, bytes(wire)))


def killed_for_good(trial: Trial) -> None:
    trial.worker = 1
    trial.start()
    trial.wait_for_round(1)
    family = killed(trial.nodes[2], trial.folder / "node-2")
    trial.finish()
    trial.seen.append(f"{alive(family)} of the node's {len(family)} processes outlived it")


def killed_and_restarted(trial: Trial) -> None:
    trial.worker = 1
    trial.start()
    trial.wait_for_round(1)
    killed(trial.nodes[2])
    before = kept(trial, 2, 1)
    trial.start_node(2)
    trial.finish()
    same = bool(before) and kept(trial, 2, 1) == before
    afresh = "starting afresh" in trial.log("node-2")
    trial.seen.append(
        ("the local half of round 1 is on its disk unchanged" if same else "ITS LOCAL HALF IS LOST")
        + (", YET IT STARTED AFRESH" if afresh else ", and it went on from it")
    )


def forges_nan(trial: Trial) -> None:
    trial.start(faults={1: {"fault": "nan", "fault-round": 2}})
    trial.finish()


def sick_data(trial: Trial) -> None:
    trial.start(faults={1: {"fault": "sick"}})
    trial.finish()


def stale(trial: Trial) -> None:
    trial.start(faults={1: {"fault": "stale", "fault-round": 2}})
    trial.finish()


def superlink_killed(trial: Trial) -> None:
    trial.worker = 1
    trial.start()
    trial.wait_for_round(1)
    family = killed(trial.superlink)
    time.sleep(20)
    left = alive(family)
    for process in family:  # a machine that goes down takes all with it
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    done = max(int(p.name.partition("-")[2]) for p in trial.server.glob("checkpoint-*"))
    trial.superlink = trial.start_superlink()
    trial.flwr_run.wait(LIMIT_S)
    trial.start_run()
    trial.finish()
    resumed = re.findall(r"continuing after round (\d+)", trial.log())
    trial.seen.append(
        f"killed after round {done}, 20 s later {left} of its {len(family)} processes were left; "
        f"second `flwr run` continued after round {', '.join(resumed) or 'NONE'}; "
        f"{sum(node.poll() is None for node in trial.nodes.values())} nodes came back by themselves"
    )


def unregistered(trial: Trial) -> None:
    trial.federation.make_key("stranger")
    trial.superlink = trial.start_superlink()
    stranger = trial.federation.node(1, name="stranger")
    for client in range(NUM_CLIENTS):
        trial.federation.register(client)
        trial.start_node(client)
    trial.start_run()
    trial.finish()
    how = "is still asking" if stranger.poll() is None else f"ended with {stranger.returncode}"
    heard = plain(trial.log("superlink")) + plain(trial.log("stranger"))
    said = re.findall(r"No SuperNode found.*|Failed to activate.*", "\n".join(heard))
    listed = trial.federation.flwr("supernode", "list", "loopback", "--format", "json")
    trial.seen.append(
        f"the SuperLink lists {len(json.loads(listed)['nodes'])} nodes; the stranger {how}"
        + f" ({' '.join(dict.fromkeys(said))})"
        + f", and trained {len(list((trial.folder / 'stranger').rglob('*')))} times"
    )


CASES: dict[str, tuple[str, int, Callable[[Trial], None]]] = {
    "nothing": ("nothing wrong", 3, nothing_wrong),
    "nan": ("a node forges NaN into its payloads from round 2 on", 2, forges_nan),
    "sick": ("a node's data hold NaN", 2, sick_data),
    "stale": ("a node answers with its first round from round 2 on", 2, stale),
    "unregistered": ("a node with an unregistered key claims client 1", 2, unregistered),
    "killed": ("a node killed (SIGKILL), not restarted", 3, killed_for_good),
    "restarted": ("a node killed (SIGKILL) and restarted", 3, killed_and_restarted),
    "superlink": ("the SuperLink killed (SIGKILL), started again, `flwr run` again", 3,
                  superlink_killed),
}  # fmt: skip


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

    def pump(source: ssl.SSLSocket, sink: ssl.SSLSocket) -> None:
        heard = bytearray()  # joined at the end: a payload's parts stay together
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                heard += data
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with lock:
            wire.extend(heard)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=connect, args=(near,), daemon=True).start()

    def connect(near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            far = outer.wrap_socket(
                socket.create_connection((host, int(target))), server_hostname="localhost"
            )
            ends = inner.wrap_socket(near, server_side=True), far
            back = threading.Thread(target=pump, args=ends[::-1], daemon=True)
            back.start()
            pump(*ends)
            back.join()

    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{port}", wire
        time.sleep(3)


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
    return (
        f"{len(wire) / 1e6:.1f} MB heard between nodes and SuperLink: {control} shared tensors of "
        f"round 1 found in it, {found} of {looked:,} pairs of numbers of the local halves, "
        f"{spoken} of their {len(names)} names"
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


def observed(trial: Trial, case: str, seconds: float) -> dict[str, Any]:
    """A row of the table."""
    path = trial.server / "history.json"
    history = History.load(path) if path.exists() else History()
    refused = Counter((c, reason) for r in history for c, reason in r.refused)
    missed = Counter(c for r in history for c in r.dropped)
    listed = json.loads(trial.federation.flwr("list", "loopback", "--format", "json"))["runs"]
    shared, local = same_bits(trial, history) if len(history) else (False, False)
    return {
        "case": case,
        "refused": [f"client {c}: {n} × {reason}" for (c, reason), n in sorted(refused.items())],
        "missed": [f"client {c}: {n}" for c, n in sorted(missed.items())],
        "rounds": f"{len(history)} of {trial.rounds}",
        "status": [run["status"] for run in listed][::-1],
        "accuracy": history[-1].metrics.get("eval_accuracy") if len(history) else None,
        "round_s": [round(r.seconds, 1) for r in history],
        "seconds": round(seconds),
        "same_global_bits": shared,
        "same_local_bits": local,
        "seen": trial.seen,
        "log": [line for line in plain(trial.log()) if re.match(r"round \d+: client", line)],
    }  # fmt: skip


def run(case: str, folder: Path) -> dict[str, Any]:
    """A case from start to end; whatever happens, nothing of it is left running."""
    title, rounds, harm = CASES[case]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.monotonic()
    trial = Trial(folder, rounds)
    with trial.federation:
        harm(trial)
        row = observed(trial, title, time.monotonic() - begin)
    return {**row, "left_running": len(trial.federation.members())}


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--resume", action="store_true", help="run only the cases that output_dir has no row of"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/flower_faults"))
    asked = parser.parse_args()
    tool("flwr")  # before anything is started
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        folder = asked.output_dir.resolve() / case
        file = folder / "row.json"
        if not (asked.resume and file.exists()):
            file.write_text(json.dumps(run(case, folder), indent=1) + "\n")
        rows.append(json.loads(file.read_text()))
        print(file.read_text(), flush=True)
    header = [
        "case", "rounds", "refused", "rounds missed", "run ended", "bits of the simulation: "
        "global, local", "s",
    ]  # fmt: skip
    lines = [
        [
            row["case"],
            row["rounds"],
            ", ".join(row["refused"]) or "nothing",
            ", ".join(row["missed"]) or "none",
            ", then ".join(row["status"]),
            ", ".join("yes" if row[f"same_{k}_bits"] else "NO" for k in ("global", "local")),
            str(row["seconds"]),
        ]
        for row in rows
    ]
    notes = [f"- {row['case']}: {'; '.join(row['seen'])}." for row in rows if row["seen"]]
    said = dict.fromkeys(line for row in rows for line in row["log"])
    text = table(header, lines) + (
        "\n\nThe simulation is FederatedTrainer in one process, without the updates that were "
        "missed or refused. A round waits "
        f"{DEADLINE_S} s for answers and needs half of them. Seconds: from nothing to the end of "
        f"the run. Processes left running afterwards: {sum(r['left_running'] for r in rows)}.\n\n"
        + "\n".join(notes)
        + "\n\nWhat the server's log says of refused updates:\n\n"
        + "\n".join(f"- `{line[:200]}`" for line in said)
    )
    write("flower_faults", "Faults of a federation of real processes, on Flower", text, rows)
    if "NO" in str(lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
