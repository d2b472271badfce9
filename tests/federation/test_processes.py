"""Two processes under ``accelerate launch`` give the bits of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpara_peft import History
from fedpara_peft.federation.server.sampling import share_out

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


@pytest.mark.parametrize(
    "case",
    [
        ("Scaffold", "pfedpara", 6, "codec"),
        ("FedAdam", "dense", 6),
        ("FedNova", "fedpara", 4),
        ("FedAvg", "pfedpara", 6, "keep"),
        ("FedAvgM", "pfedpara", 4, "ranks"),
    ],
    ids=str,
)
def test_two_processes_are_one(tmp_path, case):
    for processes in (1, 2):
        done = run(processes, "runs.py", tmp_path / str(processes), *case)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / n / "final.safetensors") for n in "12")
    assert one.keys() == two.keys()
    assert any(k.startswith("residual") for k in one) == bool({"codec", "ranks"} & {*case})
    assert any(k.startswith("optimizer") for k in one) == ("keep" in case)
    assert all(torch.equal(t, two[k]) for k, t in one.items())
    histories = [History.load(tmp_path / n / "history.json") for n in "12"]
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
    assert run(1, "runs.py", tmp_path / "mixed", "Scaffold", "pfedpara", 8).returncode == 0
    assert run(1, "runs.py", tmp_path / "whole", "Scaffold", "pfedpara", 8).returncode == 0
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
