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
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from report import table, write
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedParaConfig,
    FedParaError,
    PayloadError,
    Scaffold,
    communicated_state,
    partition,
)
from fedpara_peft.comm.codecs import codec_from_name
from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.federation.folder.checkpoint import checkpoints
from fedpara_peft.federation.strategies import Strategy

ROUNDS = 8
KILLED_ROUNDS = 60
CODECS = ["identity", "int4", "topk:0.1+int8"]
#: Ways of :func:`mutated`.
KINDS = {"payloads": (0, 1, 2, 3, 6), "headers": (4, 5)}
ACCEPTED = "accepted, finite and of the right shape"


def build() -> nn.Module:
    """A small FedPara model."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    config = FedParaConfig(r=4, base_weight="replaced", target_modules=["0"])
    return get_peft_model(net, config)


def trainer(
    folder: str, rounds: int = ROUNDS, strategy: Strategy | None = None, **settings: Any
) -> FederatedTrainer:
    """Ten clients."""
    torch.manual_seed(1)
    x = torch.randn(400, 32)
    clients = partition(TensorDataset(x, x[:, :4].argmax(1)), "iid", 10)
    args = FederatedArguments(
        folder, num_rounds=rounds, learning_rate=0.2, max_grad_norm=2.0, disable_tqdm=True,
        save_every=2, **settings,
    )  # fmt: skip
    return FederatedTrainer(build(), args, clients, strategy=strategy)


def spoilt(
    run: FederatedTrainer,
    clients: set[int],
    change: Callable[[torch.Tensor], torch.Tensor],
    beside: bool = False,
) -> FederatedTrainer:
    """Let some clients change every tensor of their updates, or of what they send beside them."""
    end = run._local.end  # where either engine's clients come to

    def spoilt_end(*args: Any) -> Any:
        trained = end(*args)
        update = trained.update
        if update.client in clients:
            groups = update.extra if beside else {"update": update.update}
            spoilt = {g: {n: change(t) for n, t in s.items()} for g, s in groups.items()}
            parts: dict[str, Any] = {"extra": spoilt} if beside else spoilt
            update = dataclasses.replace(update, **parts)
        return dataclasses.replace(trained, update=update)

    run._local.end = spoilt_end  # type: ignore[method-assign]
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
            "lost": f"round {max(t.round for t in run.ledger.transfers())}",
            "outcome": f"stopped: {str(error)[:100]}…; {where}",
        }
    refused = Counter(reason for report in history for _, reason in report.refused)
    dropped = sum(len(report.dropped) for report in history)
    turns = sum(len(report.cohort) for report in history)
    lost = refused.total() + dropped
    finite = all(bool(t.isfinite().all()) for t in run.model.state_dict().values())
    losses = [report.train_loss for report in history if report.train_loss is not None]
    return {
        "case": name,
        "refused": ", ".join(f"{n} × {reason}" for reason, n in refused.items()) or "nothing",
        "lost": f"{lost} of {turns} clients' turns" if lost else "nothing",
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
    for name, change in (("NaN", lambda t: t * float("nan")), ("huge", lambda t: t * huge)):
        case(
            f"two send {name} SCAFFOLD controls, norm bound 100",
            lambda f, change=change: spoilt(  # type: ignore[misc]
                trainer(f, strategy=Scaffold(), max_update_norm=100.0), {1, 7}, change, beside=True
            ),
        )
    rows.append(killed())
    print(rows[-1], flush=True)
    return rows


class Tells(FederatedCallback):
    """Writes the number of every finished round to a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_round_end(self, server: Any, report: Any) -> None:
        """Tell it."""
        os.write(self.pipe, bytes([report.round]))


def killed() -> dict[str, Any]:
    """A run that is killed three times and compared with one that was not."""
    rng = random.Random(0)
    kills = again = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(f"{folder}/whole", rounds=KILLED_ROUNDS)
        whole.train()
        for _ in range(3):
            last, died = killed_once(f"{folder}/cut", rng)
            kills += died
            again += last - max(checkpoints(f"{folder}/cut"), default=0) if died else 0
        run = trainer(f"{folder}/cut", rounds=KILLED_ROUNDS)
        row = ended(f"{kills} times SIGKILL in {KILLED_ROUNDS} rounds", run, resume=True)
        expected = whole.model.state_dict()
        same = all(torch.equal(t, expected[n]) for n, t in run.model.state_dict().items())
    row["lost"] = f"rounds, trained again: {again} after a checkpoint, {kills} begun"
    row["outcome"] += ", the bits of the run that was not" if same else ", OTHER BITS"
    return row


def killed_once(folder: str, rng: random.Random) -> tuple[int, bool]:
    """Kill a run some rounds after its start: its last round, and whether it died of that."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        torch.set_num_threads(1)
        os.close(reader)
        run = trainer(folder, rounds=KILLED_ROUNDS)
        run.callbacks.append(Tells(writer))
        run.train(resume_from_checkpoint=True)
        os._exit(0)
    os.close(writer)
    rounds = b""
    for _ in range(rng.randint(1, 6)):
        rounds += os.read(reader, 1)
    time.sleep(rng.uniform(0, 0.02))  # somewhere within the next one
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    rounds += os.read(reader, KILLED_ROUNDS)
    os.close(reader)
    return rounds[-1], os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def fuzz(attempts: int) -> list[dict[str, Any]]:
    """Hostile bytes: cut off, flipped, spliced, and headers that claim much."""
    rows = []
    for names, kind in [*(([codec], "payloads") for codec in CODECS), (CODECS, "headers")]:
        count = attempts // 3
        found, idle = (apart(names, kind, count, decode) for decode in (True, False))
        reasons = Counter(found["reasons"])
        row = {
            "case": f"{count:,} hostile {kind}, {names[0]}"
            if kind == "payloads"
            else f"{count:,} headers that claim terabytes, all three codecs",
            "refused": ", ".join(f"{n:,} × {reason}" for reason, n in reasons.most_common()),
            "lost": f"those {count - reasons[ACCEPTED]:,} payloads",
            "outcome": "no other error",
            "peak": f"{found['peak_mb']:.1f} MB, of them {found['peak_mb'] - idle['peak_mb']:.1f} "
            "by decoding",
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def apart(names: list[str], kind: str, count: int, decode: bool) -> dict[str, Any]:
    """:func:`attack` in a fresh process: what this one has needed must not hide it."""
    given = json.dumps([names, kind, count, decode])
    done = subprocess.run(
        [sys.executable, __file__, "--attack", given], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def attack(names: list[str], kind: str, count: int, decode: bool) -> dict[str, Any]:
    """Make hostile payloads, decode them or not; reasons, and the process's peak memory."""
    rng = random.Random(0)
    state = {n: t.clone() for n, t in communicated_state(build()).items()}
    forms = [Format(schema_of(state), codec_from_name(name)) for name in names]
    good = [form.encode(state, 0, torch.Generator().manual_seed(0)).data for form in forms]
    for form, data in zip(forms, good, strict=True):
        form.decode(data)
    reasons: Counter[str] = Counter()
    for i in range(count):
        form, data = forms[i % len(forms)], mutated(good[i % len(forms)], rng, KINDS[kind])
        if not decode:
            continue
        try:
            back = form.decode(data)
        except PayloadError as error:
            reasons[error.reason] += 1
        else:  # only values were changed: what a client might have trained
            assert all(bool(t.isfinite().all()) for t in back.values())
            reasons[ACCEPTED] += 1
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return {"reasons": reasons, "peak_mb": int(peak.split()[1]) / 1e3}


def mutated(good: bytes, rng: random.Random, kinds: Sequence[int]) -> bytes:
    """A payload spoilt in one of several ways."""
    kind = rng.choice(kinds)
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
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"  # a process that holds a GPU cannot be forked
    torch.set_num_threads(1)
    if options.attack:
        print(json.dumps(attack(*json.loads(options.attack))))
        return
    rows = runs() + fuzz(options.fuzz)
    columns = {
        "case": "case",
        "refused": "refused",
        "lost": "what was lost",
        "outcome": "how it ended",
        "peak": "peak memory",
    }
    text = table([*columns.values()], [[row.get(c, "-") for c in columns] for row in rows])
    text += (
        f"\n\n{ROUNDS} rounds of ten clients. Killed: once a round of it is done, in the middle of "
        "a later one; only processes that died of it count. Peak memory: resident, of "
        "a fresh process, and what it is above one that makes the same bytes and decodes none."
    )
    write("faults", "Faults", text, rows)
    if any(word in row["outcome"] for row in rows for word in ("NOT FINITE", "OTHER BITS")):
        sys.exit(1)


if __name__ == "__main__":
    main()
