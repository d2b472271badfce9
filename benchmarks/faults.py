"""What a federation does when things go wrong: refused, lost, and how the run ended.

    python benchmarks/faults.py [--fuzz 100000]

Each case is a run of ten clients, all sampled in every round, of which some drop out, diverge or
send something else than they should. The last cases feed hostile bytes to the decoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from report import table, write
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    FederatedArguments,
    FederatedTrainer,
    FedParaConfig,
    FedParaError,
    PayloadError,
    communicated_state,
    partition,
)
from fedpara_peft.comm.codecs import codec_from_name
from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import schema_of

ROUNDS = 8


def build() -> nn.Module:
    """A small FedPara model."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    config = FedParaConfig(r=4, base_weight="replaced", target_modules=["0"])
    return get_peft_model(net, config)


def trainer(folder: str, **settings: Any) -> FederatedTrainer:
    """Ten clients."""
    torch.manual_seed(1)
    x = torch.randn(400, 32)
    clients = partition(TensorDataset(x, x[:, :4].argmax(1)), "iid", 10)
    args = FederatedArguments(
        folder, num_rounds=ROUNDS, learning_rate=0.2, max_grad_norm=2.0, disable_tqdm=True,
        save_every=2, **settings,
    )  # fmt: skip
    return FederatedTrainer(build(), args, clients)


def spoilt(
    run: FederatedTrainer, clients: set[int], change: Callable[[torch.Tensor], torch.Tensor]
) -> FederatedTrainer:
    """Let some clients change every tensor of their updates."""
    train = run._local.train

    def turn(client: int, *rest: Any) -> Any:
        update, state = train(client, *rest)
        if client in clients:
            tensors = {name: change(t) for name, t in update.update.items()}
            update = dataclasses.replace(update, update=tensors)
        return update, state

    run._local.train = turn  # type: ignore[method-assign]
    return run


def ended(name: str, run: FederatedTrainer, resume: bool = False) -> dict[str, Any]:
    """Run it; what became of it."""
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    try:
        history = run.train(resume_from_checkpoint=resume)
    except FedParaError as error:
        same = all(torch.equal(t, before[n]) for n, t in run.model.state_dict().items())
        where = "the model is as it was" if same else "the model is the last good one"
        return {
            "case": name,
            "refused": "-",
            "outcome": f"stopped: {str(error)[:100]}…; {where}",
        }
    refused = Counter(reason for report in history for _, reason in report.refused)
    dropped = sum(len(report.dropped) for report in history)
    finite = all(bool(t.isfinite().all()) for t in run.model.state_dict().values())
    losses = [report.train_loss for report in history if report.train_loss is not None]
    return {
        "case": name,
        "refused": ", ".join(f"{n} × {reason}" for reason, n in refused.items()) or "nothing",
        "outcome": f"finished, loss {losses[0]:.2f} → {losses[-1]:.2f}"
        + (f", {dropped} drop-outs" if dropped else "")
        + ("" if finite else ", NOT FINITE"),
    }


def runs() -> list[dict[str, Any]]:
    """Cases of whole runs."""
    rows = []

    def case(name: str, prepare: Callable[[str], FederatedTrainer]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(ended(name, prepare(folder)))
            print(rows[-1], flush=True)

    huge = 1e6
    case("nothing wrong", trainer)
    case("half of the clients drop out", lambda f: trainer(f, drop_out_probability=0.5))
    case("two send NaN", lambda f: spoilt(trainer(f), {1, 7}, lambda t: t * float("nan")))
    case(
        "two send NaN, int8 payloads",
        lambda f: spoilt(trainer(f, uplink_codec="int8"), {1, 7}, lambda t: t * float("nan")),
    )
    case(
        "two send huge updates, norm bound",
        lambda f: spoilt(trainer(f, max_update_norm=100.0), {1, 7}, lambda t: t * huge),
    )
    case(
        "two send huge updates, norm clipped",
        lambda f: spoilt(trainer(f, clip_update_norm=1.0), {1, 7}, lambda t: t * huge),
    )
    case(
        "two send huge updates, median",
        lambda f: spoilt(trainer(f, aggregation="median"), {1, 7}, lambda t: t * huge),
    )
    case(
        "two send huge updates, nothing set",
        lambda f: spoilt(trainer(f), {1, 7}, lambda t: t * huge),
    )
    case(
        "six of ten send NaN, quorum one half",
        lambda f: spoilt(trainer(f, quorum=0.5), set(range(6)), lambda t: t * float("nan")),
    )
    rows.append(killed())
    return rows


def killed() -> dict[str, Any]:
    """A run that is killed three times and compared with one that was not."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(f"{folder}/whole")
        whole.train()
        for _ in range(3):
            process = os.fork()
            if not process:
                torch.set_num_threads(1)
                trainer(f"{folder}/cut").train(resume_from_checkpoint=True)
                os._exit(0)
            time.sleep(rng.uniform(0.05, 0.2))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        run = trainer(f"{folder}/cut")
        row = ended("killed three times, resumed", run, resume=True)
        expected = whole.model.state_dict()
        same = all(torch.equal(t, expected[n]) for n, t in run.model.state_dict().items())
    row["outcome"] += ", the bits of the run that was not" if same else ", OTHER BITS"
    return row


def fuzz(attempts: int) -> list[dict[str, Any]]:
    """Hostile bytes: cut off, flipped, spliced, and headers that claim much."""
    rng = random.Random(0)
    state = {n: t.clone() for n, t in communicated_state(build()).items()}
    rows = []
    for name in ("identity", "int4", "topk:0.1+int8"):
        form = Format(schema_of(state), codec_from_name(name))
        good = form.encode(state, 0, torch.Generator().manual_seed(0)).data
        reasons: Counter[str] = Counter()
        tracemalloc.start()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        share = attempts // 3
        for _ in range(share):
            try:
                back = form.decode(mutated(good, rng))
            except PayloadError as error:
                reasons[error.reason] += 1
            else:  # only values were changed: what a client might have trained
                assert all(bool(t.isfinite().all()) for t in back.values())
                reasons["accepted, finite and of the right shape"] += 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1e3
        rows.append(
            {
                "case": f"{share:,} hostile payloads, {name}",
                "refused": ", ".join(f"{n:,} × {reason}" for reason, n in reasons.most_common()),
                "outcome": f"no other error; peak {peak / 1e6:.2f} MB of Python objects, resident "
                f"memory grew by {grown:.1f} MB",
            }
        )
        print(rows[-1], flush=True)
    return rows


def mutated(good: bytes, rng: random.Random) -> bytes:
    """A payload spoilt in one of several ways."""
    kind = rng.randrange(7)
    length = int.from_bytes(good[:8], "little")
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:
        data = bytearray(good)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == 2:
        start = rng.randrange(len(good))
        return good[:start] + rng.randbytes(rng.randrange(1, 400)) + good[start:]
    if kind == 3:
        return rng.randbytes(rng.randrange(0, 2 * len(good)))
    if kind == 4:  # a length that claims terabytes
        return rng.randrange(2**40, 2**63).to_bytes(8, "little") + good[8:]
    header = json.loads(good[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    if kind == 5:  # a tensor that claims terabytes
        size = rng.randrange(2**38, 2**50)
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    else:  # something else than a tensor
        header[name] = rng.choice([None, [], -1, "x", {"dtype": {}}, {"shape": [[]]}, {"a": {}}])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuzz", type=int, default=120_000, help="hostile payloads")
    attempts = parser.parse_args().fuzz
    torch.set_num_threads(1)
    rows = runs() + fuzz(attempts)
    lines = [[row["case"], row["refused"], row["outcome"]] for row in rows]
    text = table(["case", "refused", "how it ended"], lines)
    write("faults", "Faults", text + f"\n\n{ROUNDS} rounds of ten clients.", rows)
    if any(word in row["outcome"] for row in rows for word in ("NOT FINITE", "OTHER BITS")):
        sys.exit(1)


if __name__ == "__main__":
    main()
