"""Time of start and rounds of a Flower app of ours beside a stock one, in real processes.

    python benchmarks/flower_speed.py [--rounds 4] [--output_dir outputs/flower_speed]

A SuperLink and two SuperNodes on loopback, over TLS and with keys, run three apps in turn: Flower's
stock FedAvg with a client by hand, ours, and ours with a worker on each node. All do the same
work, once with a net that is made in no time and once with a transformer read from disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from report import table, write

HERE = Path(__file__).parent
EXAMPLE, APP = HERE.parent / "examples" / "flower", HERE / "flower_app"
sys.path[:0] = [str(EXAMPLE), str(APP)]

from bench_app import work  # noqa: E402
from federation import Federation  # noqa: E402

LIMIT_S = 300  # of a run
STOCK = "stock FedAvg, client by hand"
APPS = {STOCK: ("stock", 0), "ours, worker=False": ("ours", 0), "ours, worker=True": ("ours", 1)}
PARTS = ("start_s", "import_s", "work_s")


def make_transformer(folder: Path) -> float:
    """Write a transformer of random weights; its size in MB."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8000,
        hidden_size=512,
        num_hidden_layers=11,
        num_attention_heads=8,
        intermediate_size=2048,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return sum(f.stat().st_size for f in folder.iterdir()) / 1e6


def run(federation: Federation, name: str, model: str, rounds: int) -> dict[str, Any]:
    """Run an app: seconds until its first round, of every round, and of a training message."""
    app, worker = APPS[name]
    server = federation.folder / f"{model}-{app}-{worker}"
    before = notes(federation)
    config = {
        "app": app,
        "model": model,
        "worker": worker,
        "num-rounds": rounds,
        "output-dir": str(server),
    }
    began = time.time()
    process = federation.start(server.name, "flwr", *federation.run_arguments(APP, **config))
    process.wait(LIMIT_S)
    stamps = [json.loads(line) for line in (server / "rounds.jsonl").read_text().splitlines()]
    times = [stamp["time"] for stamp in stamps]
    if len(times) != rounds + 1:
        sys.exit(f"{name}: {len(times) - 1} of {rounds} rounds, see {federation.folder}/*.log")
    messages = [n for n in notes(federation)[len(before) :] if n["message"] == "train"]
    return {
        "model": model,
        "app": name,
        "start_up_s": times[0] - began,
        "round_s": [b - a for a, b in itertools.pairwise(times)],
        "message": {part: statistics.median(n[part] for n in messages) for part in PARTS},
    }


def notes(federation: Federation) -> list[dict[str, Any]]:
    """What the nodes' processes noted, in order."""
    files = federation.folder.glob("node-*.jsonl")
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(found, key=lambda note: note["time"])


def main() -> None:
    """All apps with both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/flower_speed"))
    asked = parser.parse_args()
    folder = asked.output_dir.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stop what was started, too
    size = make_transformer(folder / "transformer")
    python_path = os.pathsep.join([str(EXAMPLE), str(APP), os.environ.get("PYTHONPATH", "")])
    variables = {
        "PYTHONPATH": python_path,
        "OMP_NUM_THREADS": "1",
        "BENCH_MODEL": str(folder / "transformer"),
    }
    rows = []
    with Federation(folder, **variables) as federation:
        federation.superlink()
        for client in range(work.CLIENTS):
            federation.register(client)
            federation.node(client)
        for model in work.MODELS:
            for name in APPS:
                rows.append(run(federation, name, model, asked.rounds))
                print(json.dumps(rows[-1]), flush=True)
    report(rows, asked.rounds, size)


def report(rows: list[dict[str, Any]], rounds: int, size: float) -> None:
    """Write the tables."""
    titles = {"small": "small net", "large": "transformer"}
    stock = {row["model"]: row for row in rows if row["app"] == STOCK}
    lines = []
    for row in rows:
        beside = stock[row["model"]]
        middle, other = (statistics.median(r["round_s"]) for r in (row, beside))
        low, high = min(row["round_s"]), max(row["round_s"])
        lines.append(
            [
                f"{titles[row['model']]}: {row['app']}",
                f"{row['start_up_s']:.1f}",
                f"{row['start_up_s'] / beside['start_up_s']:.2f}",
                f"{middle:.1f} ({low:.1f} to {high:.1f})",
                f"{middle / other:.2f}",
                *(f"{row['message'][part]:.1f}" for part in PARTS),
            ]
        )
    header = [
        "", "start-up, s", "of stock", "a round, s: median (range)", "of stock",
        "of a message: process start", "imports", "work",
    ]  # fmt: skip
    text = table(header, lines) + (
        f"\n\n{rounds} rounds a row, {work.CLIENTS} nodes, one thread a process. Start-up: from "
        "`flwr run` to the beginning of the first round, nodes being there already; ours asks each "
        "node who it is, which is a process more, and with a worker starts that, too. A message's "
        "parts are medians over both nodes: Flower's process until it calls the app, the app's "
        "imports (torch, PEFT, transformers), and what the app does, which with a worker is "
        "waiting for it. The rest of a round is the SuperNode and the server looking for messages, "
        "every 3 s on a node that has none. Both apps send the same tensors in float32. The "
        f"transformer: BERT-like, {size:.0f} MB on disk, FedPara r=4 on queries and values, one "
        f"step of {work.BATCH} sentences of 8 tokens; the small net: 64-256-10, "
        f"{work.EXAMPLES // work.BATCH} steps."
    )
    write("flower_speed", "Start and rounds on Flower, beside a stock app", text, rows)


if __name__ == "__main__":
    main()
