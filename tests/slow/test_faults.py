"""What a federation does when things go wrong: refused, lost, and how the run ended.

Each case is a run of ten clients, all sampled in every round, of which some drop out, diverge or
send something else than they should.
"""

import math
import random
import time
from collections import Counter

import pytest
import torch
from tests.forks import FORKS, kill, started
from tests.slow.faults import KILLED_ROUNDS, MODES, ROUNDS, resumable, spoilt, trainer

from fedpara_peft import RoundError, Scaffold
from fedpara_peft.federation.folder.checkpoint import checkpoints

BAD = {1, 7}


def nan(tensor):
    return tensor * float("nan")


def huge(tensor):
    return tensor * 1e6


#: By title: the trainer's settings, what bad clients send, and what is refused of them.
CASES = {
    "nothing wrong": ({}, None, {}),
    "half of the clients drop out": ({"drop_out_probability": 0.5}, None, {}),
    "two send NaN": ({}, nan, {"not_finite": 16}),
    "two send NaN, int8 payloads": ({"uplink_codec": "int8"}, nan, {"not_finite": 16}),
    "two send huge updates, norm bound": ({"max_update_norm": 100.0}, huge, {"norm": 16}),
    "two send huge updates, norm clipped": ({"clip_update_norm": 1.0}, huge, {}),
    "two send huge updates, median": ({"aggregation": "median"}, huge, {}),
    "two send huge updates, nothing set": ({}, huge, {}),
    "two send NaN SCAFFOLD controls, norm bound 100": (
        {"strategy": Scaffold(), "max_update_norm": 100.0}, nan, {"not_finite": 16},
    ),
    "two send huge SCAFFOLD controls, norm bound 100": (
        {"strategy": Scaffold(), "max_update_norm": 100.0}, huge, {"norm": 16},
    ),
    "two send NaN, secure aggregation": (MODES["secure aggregation"], nan, {"not_finite": 16}),
    "one in ten gone after masking, secure aggregation": (
        {**MODES["secure aggregation"], "unmask_drop_out_probability": 0.1}, None, {},
    ),
    "two send NaN, buffer of 4, every other client four times slower": (
        MODES["buffer of 4"], nan, {"not_finite": 2},
    ),
    "two send NaN, noise by each client": (
        {"dp_mode": "local", "clip_update_norm": 1.0, "dp_noise_multiplier": 0.01}, nan,
        {"not_finite": 16},
    ),
}  # fmt: skip


def outcome(history):
    losses = [report.train_loss for report in history if report.train_loss is not None]
    dropped = sum(len(report.dropped) for report in history)
    # Clients that protect what they send tell no loss.
    fell = f", loss {losses[0]:.2f} → {losses[-1]:.2f}" if losses else ""
    return f"finished{fell}" + (f", {dropped} drop-outs" if dropped else "")


@pytest.mark.parametrize("title", CASES)
def test_what_bad_clients_send_is_refused_and_the_run_goes_on(tmp_path, title, rows):
    settings, change, refused = CASES[title]
    run = trainer(tmp_path, **settings)
    if change is not None:
        spoilt(run, BAD, change, beside="SCAFFOLD" in title)
    history = run.train()
    found = Counter(reason for report in history for _, reason in report.refused)
    assert found == refused
    assert {c for r in history for c, _ in r.refused} == (BAD if refused else set())
    assert len(history) == ROUNDS
    assert all(bool(t.isfinite().all()) for t in run.model.state_dict().values())
    losses = [report.train_loss for report in history]
    dropped = sum(len(report.dropped) for report in history)
    assert (losses[-1] is None) == ("dp_mode" in settings)
    assert (dropped > 0) == ("drop_out_probability" in settings)
    if "nothing set" in title:
        assert losses[-1] > 1e6  # nobody asked for protection
    elif "dp_mode" not in settings:
        assert losses[-1] < 0.8 * losses[0]
    lost = found.total() + dropped
    turns = sum(len(report.cohort) for report in history)
    rows.append(
        {
            "case": title,
            "refused": ", ".join(f"{n} × {reason}" for reason, n in found.items()) or "nothing",
            "lost": f"{lost} of {turns} clients' turns" if lost else "nothing",
            "outcome": outcome(history),
        }
    )


def test_without_a_quorum_the_run_stops_and_the_model_is_as_it_was(tmp_path, rows):
    run = spoilt(trainer(tmp_path, quorum=0.5), set(range(6)), nan)
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    with pytest.raises(RoundError, match=r"4 of 10 sampled clients .* the quorum is 50%") as error:
        run.train()
    assert all(torch.equal(t, before[n]) for n, t in run.model.state_dict().items())
    rows.append(
        {
            "case": "six of ten send NaN, quorum one half",
            "refused": "-",
            "lost": f"round {max(t.round for t in run.ledger.transfers())}",
            "outcome": f"stopped: {str(error.value)[:100]}…; the model is as it was",
        }
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_killed_three_times_ends_in_the_bits_of_one_that_was_not(
    tmp_path, rows, mode
):
    rng = random.Random(0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = trainer(whole, KILLED_ROUNDS, **MODES[mode])
    expected.train()
    again = 0
    for _ in range(3):
        reader, writer = FORKS.Pipe(duplex=False)
        process = started(resumable, str(cut), writer, mode)
        writer.close()
        for _ in range(rng.randint(1, 6)):
            last = reader.recv()
        time.sleep(rng.uniform(0, 0.02))  # somewhere within the next one
        assert kill(process)
        while True:
            try:
                last = reader.recv()
            except EOFError:
                break
        again += last - max(checkpoints(cut), default=0)
    run = trainer(cut, KILLED_ROUNDS, **MODES[mode])
    history = run.train(resume_from_checkpoint=True)
    state = expected.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in run.model.state_dict().items())
    assert math.isfinite(history[-1].train_loss)
    rows.append(
        {
            "case": f"3 times SIGKILL in {KILLED_ROUNDS} rounds{mode and ', '}{mode}",
            "refused": "nothing",
            "lost": f"rounds, trained again: {again} after a checkpoint, 3 begun",
            "outcome": outcome(history) + ", the bits of the run that was not",
        }
    )


def text_of(rows):
    columns = {
        "case": "case", "refused": "refused", "lost": "what was lost", "outcome": "how it ended",
    }  # fmt: skip
    from report import table

    return table([*columns.values()], [[row[c] for c in columns] for row in rows]) + (
        f"\n\n{ROUNDS} rounds of ten clients. Killed: once a round of it is done, in the middle of "
        "a later one; every process died of it. Bytes: [hostile_bytes.md](hostile_bytes.md)."
    )


TABLE = ("faults", "Faults", text_of)
