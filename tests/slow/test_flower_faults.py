"""What a federation of real processes does when things go wrong, on Flower over TLS.

Every case starts a SuperLink and three SuperNodes with keys on loopback and runs the digits app of
examples/flower (pFedPara, int8 uplink, error feedback) on them. Afterwards the global model and
what each node keeps are compared, bit for bit, with a simulation in which the updates that were
lost or refused never came. A quarter of an hour.
"""

import contextlib
import json
import re
import time
from collections import Counter

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

import psutil
from tests.slow.flower_trial import (
    DEADLINE_S,
    LIMIT_S,
    NUM_CLIENTS,
    Trial,
    alive,
    crossed,
    kept,
    killed,
    plain,
    relay,
    same_bits,
)

from fedpara_peft import History


@pytest.fixture
def federated(tmp_path, rows):
    """Runs a case, which starts what it needs, does its harm and waits for the end."""

    def run(title, harm, rounds, refused=(), missed=(), status=("finished:completed",)):
        begin = time.monotonic()
        (tmp_path / "trial").mkdir()
        trial = Trial(tmp_path / "trial", rounds)
        with trial.federation:
            harm(trial)
            seconds = round(time.monotonic() - begin)
            history = History.load(trial.server / "history.json")
            listing = trial.federation.flwr("list", "loopback", "--format", "json")
            ended = [run["status"] for run in json.loads(listing)["runs"]][::-1]
            of_simulation = same_bits(trial, history)
        assert len(history) == rounds
        found = Counter((c, reason) for r in history for c, reason in r.refused)
        assert found == dict(refused)
        gone = Counter(c for r in history for c in r.dropped)
        assert gone.keys() == set(missed)
        assert ended == list(status)
        assert of_simulation == (True, True)
        rows.append(
            {
                "case": title,
                "rounds": rounds,
                "refused": [f"client {c}: {n} × {why}" for (c, why), n in sorted(found.items())],
                "missed": [f"client {c}: {n}" for c, n in sorted(gone.items())],
                "status": ended,
                "seconds": seconds,
                "seen": trial.seen,
                "log": [n for n in plain(trial.log()) if re.match(r"round \d+: client", n)],
                "left_running": len(trial.federation.members()),
            }
        )

    return run


def test_nothing_wrong_and_nothing_of_ones_own_on_the_wire(federated):
    def harm(trial):
        trial.worker = 1
        with relay(trial) as (address, wire):
            trial.start(address=address)
            trial.finish()
        trial.seen.append(crossed(trial, bytes(wire)))

    federated("nothing wrong", harm, 3)


@pytest.mark.parametrize(
    ("title", "fault", "refused"),
    [
        ("a node forges NaN into its payloads from round 2 on",
         {"fault": "nan", "fault-round": 2}, {(1, "not_finite"): 1}),
        ("a node's data hold NaN", {"fault": "sick"}, {(1, "diverged"): 2}),
        ("a node answers with its first round from round 2 on",
         {"fault": "stale", "fault-round": 2}, {(1, "stale"): 1}),
    ],
    ids=["NaN", "sick data", "stale"],
)  # fmt: skip
def test_what_a_node_sends_amiss_is_refused_by_name(federated, title, fault, refused):
    def harm(trial):
        trial.start(faults={1: fault})
        trial.finish()

    federated(title, harm, 2, refused)


def test_a_node_with_an_unregistered_key_is_not_let_in(federated):
    def harm(trial):
        trial.federation.make_key("stranger")
        trial.superlink = trial.start_superlink()
        stranger = trial.federation.node(1, name="stranger")
        for client in range(NUM_CLIENTS):
            trial.federation.register(client)
            trial.start_node(client)
        trial.start_run()
        trial.finish()
        assert stranger.poll() not in (None, 0)
        assert not list((trial.folder / "stranger").rglob("*"))
        heard = plain(trial.log("superlink")) + plain(trial.log("stranger"))
        said = re.findall(r"No SuperNode found.*|Failed to activate.*", "\n".join(heard))
        listed = trial.federation.flwr("supernode", "list", "loopback", "--format", "json")
        assert len(json.loads(listed)["nodes"]) == NUM_CLIENTS
        trial.seen.append(
            f"the SuperLink lists {NUM_CLIENTS} nodes; the stranger ended with "
            f"{stranger.returncode} ({' '.join(dict.fromkeys(said))}) and trained nothing"
        )

    federated("a node with an unregistered key claims client 1", harm, 2)


def test_a_killed_node_takes_its_worker_along_and_the_run_goes_on(federated):
    def harm(trial):
        trial.worker = 1
        trial.start()
        trial.wait_for_round(1)
        family = killed(trial.nodes[2], trial.folder / "node-2")
        trial.finish()
        assert len(family) > 1
        assert not alive(family)
        trial.seen.append(f"none of the node's {len(family)} processes outlived it")

    federated("a node killed (SIGKILL), not restarted", harm, 3, missed=[2])


def test_a_node_that_is_killed_and_restarted_goes_on_from_its_disk(federated):
    def harm(trial):
        trial.worker = 1
        trial.start()
        trial.wait_for_round(1)
        killed(trial.nodes[2])
        before = kept(trial, 2, 1)
        trial.start_node(2)
        trial.finish()
        assert before
        assert kept(trial, 2, 1) == before
        assert "starting afresh" not in trial.log("node-2")
        trial.seen.append("its local half of round 1 is on its disk unchanged, and it went on")

    federated("a node killed (SIGKILL) and restarted", harm, 3, missed=[2])


def test_a_run_goes_on_after_its_superlink_was_killed(federated):
    def harm(trial):
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
        assert resumed == [str(done)]
        back = sum(node.poll() is None for node in trial.nodes.values())
        assert back == NUM_CLIENTS
        trial.seen.append(
            f"killed after round {done}, 20 s later {left} of its {len(family)} processes were "
            f"left; the second `flwr run` continued after it; {back} nodes came back by themselves"
        )

    title = "the SuperLink killed (SIGKILL), started again, `flwr run` again"
    federated(title, harm, 3, status=("finished:failed", "finished:completed"))


def text_of(rows):
    from report import table

    header = ["case", "rounds", "refused", "rounds missed", "run ended", "s"]
    lines = [
        [
            row["case"],
            str(row["rounds"]),
            ", ".join(row["refused"]) or "nothing",
            ", ".join(row["missed"]) or "none",
            ", then ".join(row["status"]),
            str(row["seconds"]),
        ]
        for row in rows
    ]
    notes = [f"- {row['case']}: {'; '.join(row['seen'])}." for row in rows if row["seen"]]
    said = dict.fromkeys(line for row in rows for line in row["log"])
    return table(header, lines) + (
        "\n\nEvery run ended in the bits of the simulation, globally and on every node: "
        "FederatedTrainer in one process, without the updates that were missed or refused. A "
        f"round waits {DEADLINE_S} s for answers and needs half of them. Seconds: from nothing to "
        "the end of the run. Processes left running afterwards: "
        f"{sum(r['left_running'] for r in rows)}.\n\n"
        + "\n".join(notes)
        + "\n\nWhat the server's log says of refused updates:\n\n"
        + "\n".join(f"- `{line[:200]}`" for line in said)
    )


TABLE = ("flower_faults", "Faults of a federation of real processes, on Flower", text_of)
