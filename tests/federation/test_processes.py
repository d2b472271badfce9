"""Two processes under ``accelerate launch`` give the bits of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.federation import runs
from tests.forks import finish, started

from fedpara_peft import History
from fedpara_peft.federation.server.sampling import share_out

pytestmark = pytest.mark.programs

HERE = Path(__file__).parent
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def run(processes, script, *arguments):
    launch = [*LAUNCH, "--num_processes", str(processes)] if processes > 1 else [sys.executable]
    done = subprocess.run(
        [*launch, HERE / script, *map(str, arguments)],
        # Accelerate's way of several processes on CPUs; equally many threads in each.
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done


CASES = [
    ("Scaffold", "pfedpara", 6, "codec"),
    ("FedAdam", "dense", 6),
    ("FedNova", "fedpara", 4),
    ("FedAvg", "pfedpara", 6, "keep"),
    ("FedAvgM", "pfedpara", 4, "ranks"),
]


def test_two_processes_are_one(tmp_path):
    launch(2, tmp_path / "2", *CASES)
    for case in CASES:
        finish(started(runs.run, tmp_path / "1" / name(case), *case))
        same(tmp_path / "1" / name(case), tmp_path / "2" / name(case), case)


def launch(processes, folder, *cases):
    """One launch for all cases: their processes are the same ones."""
    each = [(folder / name(case), *case) for case in cases]
    words = [word for case in each for word in ("--", *case)]
    done = run(processes, "runs.py", *words)
    assert done.returncode == 0, done.stderr


def name(case):
    return "-".join(map(str, case))


def same(first, second, case):
    """Every bit and every figure of two runs."""
    one, two = (load_file(folder / "final.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    assert any(k.startswith("residual") for k in one) == bool({"codec", "ranks"} & {*case})
    assert any(k.startswith("optimizer") for k in one) == ("keep" in case)
    assert all(torch.equal(t, two[k]) for k, t in one.items()), case
    histories = [History.load(folder / "history.json") for folder in (first, second)]
    for a, b in zip(*histories, strict=True):
        assert (a.train_loss, a.metrics, a.client_metrics) == (
            b.train_loss,
            b.metrics,
            b.client_metrics,
        )
        assert a.uplink_bytes == b.uplink_bytes > 0
        assert a.slowest_client_s > 0 < b.slowest_client_s


def test_one_process_continues_what_two_began(tmp_path):
    assert run(2, "runs.py", tmp_path / "mixed", "Scaffold", "pfedpara", 4).returncode == 0
    for folder in ("mixed", "whole"):
        finish(started(runs.run, tmp_path / folder, "Scaffold", "pfedpara", 8))
    mixed, whole = (load_file(tmp_path / n / "final.safetensors") for n in ("mixed", "whole"))
    assert all(torch.equal(t, mixed[k]) for k, t in whole.items())


def test_a_client_that_diverges_elsewhere_stops_everybody(tmp_path):
    done = run(2, "runs.py", tmp_path, "FedAvg", "dense", 6, "diverge")
    assert done.returncode != 0
    assert done.stderr.count("RoundError") >= 2  # both processes, none waiting for the other
    assert "diverged in round 1" in done.stderr


def test_clients_are_shared_by_size():
    sizes = [10, 70, 30, 40, 20, 30]
    owners = share_out(range(6), sizes, 2)
    assert {sum(sizes[c] for c, p in owners.items() if p == process) for process in (0, 1)} == {100}
    assert share_out([3], sizes, 2) == {3: 0}
