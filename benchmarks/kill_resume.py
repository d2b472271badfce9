"""Kill training at random moments, resume it, and compare every bit with an uninterrupted run.

    python benchmarks/kill_resume.py [--kills 3]

Every strategy with every parameterization, and what else keeps a state or draws numbers: codecs
with error feedback, one factor block a round, FedPer, stacked clients, noise. Each run is a process
of its own that is sent SIGKILL, several times, and then runs to its end. Compared are the global
model, every client's own, and its codec's residual.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import table, write
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "federation"))
from runs import PARAMETERIZATIONS, STRATEGIES, run

ROUNDS = 24
#: Of the tests' variants, each with a strategy and a parameterization that it means something for.
MORE = [
    ("FedAvg", "fedpara", "codec"),
    ("Scaffold", "pfedpara", "codec"),
    ("FedAvg", "fedpara", "one_block"),
    ("FedAvgM", "dense", "FedPer"),
    ("Scaffold", "fedpara", "batched"),
    ("FedAvg", "fedpara", "noise"),
]


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="kills per run")
    kills = parser.parse_args().kills
    torch.set_num_threads(1)  # also lets a process be forked that has torch loaded
    os.environ["ACCELERATE_USE_CPU"] = "true"  # a process that holds a GPU cannot be forked
    rng = random.Random(0)
    rows = []
    for each in [*itertools.product(STRATEGIES, PARAMETERIZATIONS, [None]), *MORE]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(case(Path(folder), each, kills, rng))
        print(rows[-1], flush=True)
    lines = [
        [
            ", ".join(filter(None, (r["strategy"], r["parameterization"], r["variant"]))),
            str(r["kills"]),
            ", ".join(str(n) for n in r["resumed_from"]),
            str(r["unfinished_checkpoints"]),
            "yes" if r["same_bits"] else "NO",
        ]
        for r in rows
    ]
    header = [
        "run", "killed, times", "resumed from round", "half-written checkpoints left", "same bits",
    ]  # fmt: skip
    total = sum(r["kills"] for r in rows)
    same = sum(r["same_bits"] for r in rows)
    text = table(header, lines) + (
        f"\n\n{total} kills; {same} of {len(rows)} runs ended in the uninterrupted run's bits. "
        f"{ROUNDS} rounds, a checkpoint every 3. Round 0: killed before the first checkpoint."
    )
    write("kill_resume", "Killed with SIGKILL and resumed", text, rows)
    if same < len(rows):
        sys.exit(1)


def case(
    folder: Path, each: tuple[str, str, str | None], kills: int, rng: random.Random
) -> dict[str, Any]:
    """One run killed several times."""
    whole, cut = folder / "whole", folder / "cut"
    strategy, parameterization, variant = each

    def start_in(where: Path) -> int:
        return started(lambda: run(str(where), strategy, parameterization, ROUNDS, variant))

    start = time.perf_counter()
    wait(start_in(whole))
    duration = time.perf_counter() - start
    done, unfinished, resumed = 0, 0, []
    while done < kills:
        process = start_in(cut)
        time.sleep(rng.uniform(0, 0.6 * duration))
        os.kill(process, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(process, 0)[1]):  # else it had ended already
            done += 1
        unfinished += len(list(cut.glob(".checkpoint-*.partial")))
        resumed.append(max((int(p.name[11:]) for p in cut.glob("checkpoint-*")), default=0))
        if (cut / "final.safetensors").exists():
            break
    wait(start_in(cut))
    expected, found = (load_file(f / "final.safetensors") for f in (whole, cut))
    same = expected.keys() == found.keys() and all(
        torch.equal(t, found[name]) for name, t in expected.items()
    )
    return {
        "strategy": strategy,
        "parameterization": parameterization,
        "variant": variant,
        "kills": done,
        "resumed_from": resumed,
        "unfinished_checkpoints": unfinished,
        "same_bits": same,
    }


def started(function: Callable[[], None]) -> int:
    """Run a function in a forked process; its process id."""
    process = os.fork()
    if process:
        return process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = 1
    try:
        function()
        status = 0
    finally:
        os._exit(status)


def wait(process: int) -> None:
    """Wait for a process that must succeed."""
    if os.waitpid(process, 0)[1] != 0:
        raise SystemExit("a run failed")


if __name__ == "__main__":
    main()
