"""Kill training at random moments, resume it, and compare every bit with an uninterrupted run.

Every strategy with every parameterization, and what else keeps a state or draws numbers: codecs
with error feedback, one factor block a round, FedPer, stacked clients, noise, kept optimizers. Each
run is a process of its own that is sent SIGKILL, several times, and then runs to its end. Compared
are the global model, every client's own, its codec's residual and its optimizer's state.
"""

import itertools
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.federation.runs import PARAMETERIZATIONS, STRATEGIES, run
from tests.forks import finish, kill, started

ROUNDS, KILLS = 24, 3
#: Of the tests' variants, each with a strategy and a parameterization that it means something for.
MORE = [
    ("FedAvg", "fedpara", "codec"),
    ("Scaffold", "pfedpara", "codec"),
    ("FedAvg", "fedpara", "one_block"),
    ("FedAvgM", "dense", "FedPer"),
    ("Scaffold", "fedpara", "batched"),
    ("FedAvg", "fedpara", "noise"),
    ("FedAvg", "pfedpara", "keep"),
    ("FedDyn", "pfedpara", "secure"),
    ("FedAvgM", "pfedpara", "late"),
]
CASES = [*itertools.product(STRATEGIES, PARAMETERIZATIONS, [None]), *MORE]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_a_killed_run_ends_in_the_bits_of_one_that_was_not(tmp_path, case, rows):
    rng = random.Random(str(case))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    strategy, parameterization, variant = case

    def start_in(folder):
        return started(run, str(folder), strategy, parameterization, ROUNDS, variant)

    begin = time.perf_counter()
    finish(start_in(whole))
    duration = time.perf_counter() - begin
    kills, unfinished, resumed = 0, 0, []
    while kills < KILLS:
        process = start_in(cut)
        time.sleep(rng.uniform(0, 0.6 * duration))
        kills += kill(process)
        unfinished += len(list(cut.glob(".checkpoint-*.partial")))
        resumed.append(max((int(p.name[11:]) for p in cut.glob("checkpoint-*")), default=0))
        if (cut / "final.safetensors").exists():
            if kills:
                break
            shutil.rmtree(cut)  # it had ended before it could be killed: again, and sooner
            duration, unfinished, resumed = duration / 2, 0, []
    finish(start_in(cut))
    expected, found = (load_file(f / "final.safetensors") for f in (whole, cut))
    assert kills
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    rows.append(
        {
            "strategy": strategy,
            "parameterization": parameterization,
            "variant": variant,
            "kills": kills,
            "resumed_from": resumed,
            "unfinished_checkpoints": unfinished,
            "same_bits": True,
        }
    )


def text_of(rows):
    lines = [
        [
            ", ".join(filter(None, (r["strategy"], r["parameterization"], r["variant"]))),
            str(r["kills"]),
            ", ".join(str(n) for n in r["resumed_from"]),
            str(r["unfinished_checkpoints"]),
        ]
        for r in rows
    ]
    header = ["run", "killed, times", "resumed from round", "half-written checkpoints left"]
    from report import table

    kills = sum(r["kills"] for r in rows)
    return table(header, lines) + (
        f"\n\n{kills} kills; all {len(rows)} runs ended in the uninterrupted run's bits. "
        f"{ROUNDS} rounds, a checkpoint every 3. Round 0: killed before the first checkpoint."
    )


TABLE = ("kill_resume", "Killed with SIGKILL and resumed", text_of)
