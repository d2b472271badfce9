"""The GPU's tables, tried out on a CPU: every part, what fails, what hangs, and the rule's twin."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedpara_peft.maths.cost import Costs, operations

pytestmark = pytest.mark.programs

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
#: More do not come back from where the GPU may be.
MOST_FILES = 8


@pytest.fixture
def gpu(monkeypatch):
    """The folder's modules, none of which needs torch."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import cost_rule
    import pages
    import rows
    import run

    yield {"cost_rule": cost_rule, "pages": pages, "rows": rows, "run": run}
    for name in ("cost_rule", "pages", "rows", "run"):
        del sys.modules[name]


def python(code):
    return [sys.executable, "-c", code]


def test_every_line_runs_on_a_cpu_and_makes_its_tables(tmp_path):
    command = [sys.executable, FOLDER / "run.py", "--device", "cpu", "--smoke", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.iterdir())) <= MOST_FILES
    wanted = {
        "correctness": ["| lstm | replaced |", "resume after 3 of 5 rounds: bits: FedAvg, fedpara"],
        "adapters": ["A Llama of", "A training step of one", "Inference of one", "## Compiled"],
        "cost": ["| linear, float32, replaced, training | 1 |", "## The worst choices"],
        "from_scratch": ["| small, batch 2 | float32 |", "| small LSTM, batch 2 |", "## Compiled"],
        "federation": ["| MLP, r = 2 |", "| CNN, r = 2 |", "2 of 200 rounds"],
    }
    for page, texts in wanted.items():
        text = (tmp_path / f"{page}.md").read_text()
        assert [t for t in texts if t not in text] == [], text
        assert "failed or is missing" not in text
        assert f"torch {torch.__version__}" in text
        assert "--parts" in text


def test_a_layer_that_computes_something_else_fails_the_run(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parent)!r}]
from pathlib import Path
import part_correctness as checks
from fedpara_peft.tuner.kinds import Linear
from session import Session
session = Session("correctness", "cpu", True, Path({str(tmp_path)!r}), 100)
case = [("layers", checks.layer, {{"kind": "linear", "mode": "frozen", "way": "float32"}})]
session.each(case)
assert session.failures == 0
Linear.scale_of = lambda self, adapter: 1.001 * self.scaling[adapter]
session.each(case)
sys.exit(session.failures)
"""
    done = subprocess.run(python(code), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["table"] for row in found] == ["environment", "layers", "error"]
    assert found[2]["error"].startswith("WrongError: relative errors above 0.0001: fedpara, plain")


def test_what_fails_or_hangs_stops_neither_the_others_nor_loses_their_rows(gpu, tmp_path, capsys):
    write = f"""
import sys; sys.path.insert(0, {str(FOLDER)!r})
from pathlib import Path; import rows
out = Path({str(tmp_path)!r})
"""
    child = """
import subprocess, time
held = subprocess.Popen(["sleep", "600"])
rows.append(out, {"part": "hangs", "table": "x", "pid": held.pid})
time.sleep(600)
"""
    commands = [
        python(
            f"{write}rows.append(out, {{'part': 'fails', 'table': 'x'}}); raise ValueError('no')"
        ),
        python(write + child),
        python(f"{write}rows.append(out, {{'part': 'works', 'table': 'x', 'given': {{seconds}}}})"),
    ]
    names = ["fails", "hangs", "works"]
    start = time.monotonic()
    seconds = 12 + gpu["run"]._TABLES_S
    failed = gpu["run"].run_parts([[n] for n in names], commands, [1, 1, 1], seconds, tmp_path)
    assert time.monotonic() - start < 60
    assert failed == ["fails", "hangs"]
    said = capsys.readouterr().out
    assert "fails: failed with 1, 1 rows" in said
    assert "ValueError: no" in said
    assert "hangs: ended at its limit, 1 rows" in said
    assert "works: done, 1 rows" in said
    found = gpu["rows"].read(tmp_path)
    assert [row["part"] for row in found] == names
    # What the part before used is left out of the last one's time, which is half of it at least.
    assert 0 < found[2]["given"] < 12
    pid = found[1]["pid"]
    with pytest.raises(ProcessLookupError):  # it must not go on holding the GPU
        _until_gone(pid)


def _until_gone(pid):
    for _ in range(100):
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(") ")[2].startswith("Z"):
            raise ProcessLookupError  # dead; whose child it became has not asked yet
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)


def test_a_line_that_was_cut_short_is_left_out(gpu, tmp_path):
    gpu["rows"].append(tmp_path, {"part": "cost", "table": "x"})
    gpu["rows"].append(tmp_path, {"part": "clients", "table": "x"})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"part": "cost", "tab')
    assert [row["part"] for row in gpu["rows"].read(tmp_path)] == ["cost", "clients"]
    gpu["rows"].forget(tmp_path, ["cost"])
    gpu["rows"].append(tmp_path, {"part": "cost", "table": "y"})
    assert [row["table"] for row in gpu["rows"].read(tmp_path)] == ["x", "y"]


def test_another_runs_parts_replace_those_that_are_here(gpu, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, table in ((here, "old"), (there, "new")):
        folder.mkdir()
        for part in ("cost", "clients") if folder == here else ("cost",):
            gpu["rows"].append(folder, {"part": part, "table": table})
    assert gpu["run"].main(["--out", str(here), "--merge", str(there)]) == 0
    found = [(row["part"], row["table"]) for row in gpu["rows"].read(here)]
    assert found == [("clients", "old"), ("cost", "new")]


def test_pages_tell_what_failed_and_what_there_was_no_time_for(gpu, tmp_path):
    for row in (
        {"table": "environment", "command": "c", "gpu": "G"},
        {"table": "cut", "done": 3, "of": 9},
        {"table": "error", "of": "linear", "case": {"m": 4}, "error": "OutOfMemoryError: much"},
        linear_row(
            positions=8,
            compose=2.0,
            khatri_rao=1.0,
        ),
    ):
        gpu["rows"].append(tmp_path, {"part": "cost", **row})
    assert gpu["pages"].write(tmp_path) == 0
    text = (tmp_path / "cost.md").read_text()
    assert "cost: there was time for 3 of 9 cases" in text
    assert "cost, linear, {'m': 4}: OutOfMemoryError: much" in text
    assert "| linear, bf16, frozen, training | 1 | 0% | 100.0% | 100% |" in text


def linear_row(positions, compose, khatri_rao, r=4, size=64, training=True):
    form = r**2 * 2 * size
    ms = {"compose": [compose] * 3, "khatri_rao": [khatri_rao] * 3}
    return {
        "table": "linear", "m": size, "n": size, "tokens": positions, "r": r, "rank": r,
        "precision": "bf16", "base": "frozen", "training": training, "joined": True,
        "positions": positions, "dense": size**2, "form": form, "ms": ms,
    }  # fmt: skip


def test_the_rule_that_is_fitted_is_the_rule_that_is_used(gpu):
    rule = gpu["cost_rule"]
    for training, launches in itertools.product((True, False), (0, 1 << 30)):
        for joined in (True, False):
            for positions in (1, 3, 64, 4096):
                for r in (2, 8, 16, 32):
                    row = linear_row(positions, 1, 1, r, size=768, training=training)
                    form, compose = operations(
                        positions=positions, dense=row["dense"], form=row["form"],
                        features=row["m"] + row["n"], r=r, training=training, joined=joined,
                        costs=Costs(64, 64, 32, launches),
                    )  # fmt: skip
                    found = rule.chosen({**row, "joined": joined}, 64.0, 32.0, launches)
                    assert found == ("khatri_rao" if form <= compose else "compose")


def test_a_fit_finds_the_constants_that_times_were_made_of(gpu):
    rule = gpu["cost_rule"]
    cases = []
    for positions in (1, 16, 64, 512, 2048):
        for r in (2, 4, 8, 16):
            for size in (256, 1024, 4096):
                row = linear_row(positions, 1, 1, r, size)
                form, compose = rule.counted(row, 1024.0, 64.0, 2.0**28)
                cases.append(linear_row(positions, compose, form, r, size))
    constants = rule.fitted(cases, [rule.PASS_COSTS, rule.ACTIVATIONS, rule.LAUNCHES])
    assert rule.judged(cases, lambda row: rule.chosen(row, *constants)) == (0, 0, 1)
    mean, worst, close = rule.judged(cases, lambda row: rule.chosen(row, 64.0, 64.0))
    assert mean > 0.01
    assert worst > 0.5
    assert close < 1


def test_a_committed_ratio_holds_within_noise_or_its_own_spread(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    import check

    steady, noisy = [1.19, 1.20, 1.21, 1.20], [0.8, 1.1, 1.3, 1.9]
    assert check.holds(1.30, steady)
    assert not check.holds(1.35, steady)
    assert not check.holds(1.05, steady)
    assert check.holds(1.40, noisy)
    assert not check.holds(2.0, noisy)
    rows = check.committed("from_scratch")["rows"]
    assert {row.get("model") for row in rows} >= set(check.MODELS)
    rows = check.committed("adapters")["rows"]
    assert {(r["m"], r["n"], r["tokens"], r["r"]) for r in rows} >= set(check.LAYERS)
