"""Flower: the same run as the simulation's, bit for bit, whoever fails to answer."""

import dataclasses
import functools
import importlib
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
from safetensors.torch import load_file

from fedpara_peft import (
    AgreementError,
    ArgumentsError,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FederatedTrainer,
    History,
    LocalOnly,
    PayloadError,
    ResumeError,
    RoundError,
    Scaffold,
    accuracy,
)
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.federation.folder.store import DiskStore

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from tests.comm.test_codec_of_ones_own import Signs
from tests.federation.runs import FedNova
from tests.federation.test_local_loss import Moon
from tests.integrations import flower_task as task

from fedpara_peft.integrations.flower import client_app, server_app
from fedpara_peft.integrations.flower.messages import introduction_record, read_introduction
from fedpara_peft.integrations.report import write_report
from fedpara_peft.integrations.run_folder import load_run

KEEP = {
    "optim": "adamw", "momentum": 0.0, "learning_rate": 0.01, "optimizer_state": "keep",
    "factor_learning_rate": 0.02, "lr_scheduler_type": "cosine", "warmup_rounds": 1,
}  # fmt: skip
INT8 = {"uplink_codec": "int8", "downlink_codec": "int8", "error_feedback": True}


@pytest.fixture(autouse=True)
def _task(monkeypatch):
    """What Flower sets in the process of a server app."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class LocalGrid(Grid):
    """Hands messages to client apps in this process, nodes numbered from 100."""

    def __init__(self, apps, tmp_path, spoil=None):
        self.apps, self.tmp_path, self.spoil = apps, tmp_path, spoil
        self.numbers = itertools.count(1)
        self.replies = {}
        self.wire = []

    run = property()
    set_run = create_message = send_and_receive = None

    def get_node_ids(self):
        return [100 + i for i in range(len(self.apps))]

    def context(self, node):
        config = {"partition-id": node - 100, "state-dir": str(self.tmp_path / f"node-{node}")}
        return Context(1, node, config, RecordDict(), {})

    def push_messages(self, messages):
        ids = []
        for message in messages:
            name = str(next(self.numbers))
            message.metadata.__dict__["_message_id"] = name
            ids.append(name)
            node = message.metadata.dst_node_id
            try:
                reply = self.apps[node - 100](message, self.context(node))
            except Exception as error:
                reply = Message(Error(2, repr(error)), reply_to=message)
            training = message.metadata.message_type == "train"
            if training:
                self.wire += [message, reply]
            # Answers arrive in another order than messages went out.
            found = self.spoil(message, reply) if self.spoil and training else [reply]
            self.replies[name] = found
        return ids

    def pull_messages(self, message_ids):
        asked = [name for name in reversed(list(message_ids)) if name in self.replies]
        return [reply for name in asked for reply in self.replies.pop(name)]


def run(
    tmp_path, strategy=None, spoil=None, deadline_s=5.0, apps=None, resume=True, ranks=None, **more
):
    """A run over a grid: the grid, and what the server left in its folder."""
    args = task.arguments(tmp_path / "server", **more)
    apps = apps or [
        client_app(task.model_fn, task.data_fn, args, strategy=strategy, client_ranks=ranks)
        for _ in range(task.CLIENTS)
    ]
    grid = LocalGrid(apps, tmp_path, spoil)
    server = server_app(
        task.model_fn, args, task.CLIENTS, strategy=strategy, eval_data_fn=task.data,
        compute_metrics=accuracy, deadline_s=deadline_s, resume=resume,
        client_ranks=ranks,
    )  # fmt: skip
    server(grid, Context(1, 1, {}, RecordDict(), {}))
    return grid


def history(tmp_path):
    return History.load(tmp_path / "server" / "history.json")


def simulate(tmp_path, strategy=None, ranks=None, **more):
    args = task.arguments(tmp_path / "simulated", save_every=1, **more)
    trainer = FederatedTrainer(
        task.model_fn(), args, task.clients(), task.data(), strategy=strategy,
        compute_metrics=accuracy, client_ranks=ranks,
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_same(tmp_path, trainer, rounds=4):
    ours = load_file(tmp_path / "server" / f"checkpoint-{rounds}" / "server.safetensors")
    theirs = load_file(tmp_path / "simulated" / f"checkpoint-{rounds}" / "server.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    timeless = {"seconds": 0.0, "slowest_client_s": None}
    plain = [dataclasses.replace(r, **timeless) for r in history(tmp_path)]
    assert plain == [dataclasses.replace(r, **timeless) for r in trainer.history]
    assert history(tmp_path).wall_clock_s(trainer.ledger, 10.0) is None  # nodes do not tell
    ledger = Ledger.load(tmp_path / "server" / "ledger.npy")
    assert list(ledger.transfers()) == list(trainer.ledger.transfers())


def run_folder(tmp_path, client):
    (folder,) = (tmp_path / f"node-{100 + client}" / f"client-{client}").glob("run-*")
    return folder


def assert_same_clients(tmp_path, trainer):
    for client in range(task.CLIENTS):
        ours, theirs = (
            DiskStore(run_folder(tmp_path, client)).get(client),
            trainer.client_state(client),
        )
        groups = {*ours.strategy, *theirs.strategy}
        for found, expected in [
            (ours.local, theirs.local),
            (ours.residual, theirs.residual),
            *((ours.strategy[g], theirs.strategy[g]) for g in groups),
            *((ours.optimizer[p], theirs.optimizer[p]) for p in theirs.optimizer),
        ]:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (FedAvg(), {}),
        (FedAvg(), {"clients_per_round": 2, "client_sampling": "weighted"}),
        (FedDyn(), {**INT8, "clients_per_round": 2, "clip_update_norm": 0.1}),
        (Scaffold(), {"clients_per_round": 2}),
        (FedAvg(), INT8),
        (Scaffold(), {**INT8, "clients_per_round": 2, "clip_update_norm": 0.1}),
        (Scaffold(), {"clients_per_round": 2, "max_update_norm": 2.0}),  # refuses some
        (FedDyn(), {"clients_per_round": 2, "max_update_norm": 0.6}),
        (FedAdam(), {"factor_schedule": "one_block", "aggregation": "median"}),
        (FedAvg(), {"uplink_codec": "int8", "error_feedback": True}),
        (FedAvg(), {"downlink_codec": "float16", "error_feedback": True}),
        (LocalOnly(), {}),
        (FedNova(), INT8),
        (Moon(), {"clients_per_round": 2}),
        (FedAvg(), {"uplink_codec": Signs(), "error_feedback": True}),
        (FedAvg(), {**KEEP, "clients_per_round": 2}),
        (FedDyn(), {"momentum": 0.9, "optimizer_state": "keep"}),
        (FedAvg(), {"client_weighting": "tokens", "per_client_max_steps": 2}),  # not the rows'
    ],
)
def test_the_result_is_the_simulations(tmp_path, strategy, more):
    run(tmp_path, strategy, save_every=1, **more)
    trainer = simulate(tmp_path, strategy, **more)
    assert_same(tmp_path, trainer)
    assert_same_clients(tmp_path, trainer)


@pytest.mark.parametrize(
    "more",
    [
        {"clients_per_round": 2},
        {"uplink_codec": "int8", "error_feedback": True},
        {"downlink_codec": "int8", "factor_schedule": "one_block"},
        KEEP,
    ],
)
def test_nodes_of_different_ranks_are_the_simulations(tmp_path, more):
    ranks = [1, 0.5, 3]
    run(tmp_path, FedAvgM(), save_every=1, ranks=ranks, **more)
    trainer = simulate(tmp_path, FedAvgM(), ranks=lambda client: ranks[client], **more)
    assert_same(tmp_path, trainer)
    assert_same_clients(tmp_path, trainer)


def test_a_node_of_another_rank_than_the_server_knows_is_refused_by_name(tmp_path):
    args = task.arguments(tmp_path / "server")
    apps = [
        client_app(task.model_fn, task.data_fn, args, client_ranks={1: own}) for own in (1, 2, 1)
    ]
    run(tmp_path, apps=apps, ranks={1: 1}, quorum=0.5)
    for report in history(tmp_path):
        assert report.refused == ((1, "schema"),)


def test_a_seeded_base_is_drawn_on_each_node_and_never_sent(tmp_path, monkeypatch):
    plain = run(tmp_path / "replaced", save_every=1)
    monkeypatch.setattr(task, "model_fn", functools.partial(task.model_fn, "seeded"))
    grid = run(tmp_path, save_every=1)
    trainer = simulate(tmp_path)
    assert_same(tmp_path, trainer)
    assert_same_clients(tmp_path, trainer)
    base = task.model_fn().base_model.model[0].get_base_layer().weight.detach().numpy().tobytes()
    sent = [payload_of(m) for m in grid.wire if "payload" in m.content]
    assert sent
    assert not any(base[:64] in payload for payload in sent)
    assert [len(p) for p in sent] == [
        len(payload_of(m)) for m in plain.wire if "payload" in m.content
    ]


def payload_of(message):
    return message.content["payload"]["data"].data


def with_payload(reply, change):
    data = change(payload_of(reply))
    array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
    reply.content["payload"] = ArrayRecord({"data": array})
    return [reply]


def with_another_record(reply):
    reply.content["payload"] = ConfigRecord({"data": b"no array"})
    return [reply]


def with_metric(name, value):
    def change(reply):
        reply.content["metrics"][name] = value
        return [reply]

    return change


def without_records(reply):
    reply.content = RecordDict()
    return [reply]


def with_nan(data):
    """A payload whose first float32 is NaN: wide dtypes come first, one int64 here."""
    start = 8 + int.from_bytes(data[:8], "little") + 8
    return data[:start] + b"\0\0\xc0\x7f" + data[start + 4 :]


FAULTS = {
    "silent": (lambda reply: [], None),
    "error": (lambda reply: [Message(Error(8, "killed"), reply_to=reply)], None),
    "nan": (lambda reply: with_payload(reply, with_nan), "not_finite"),
    "cut": (lambda r: with_payload(r, lambda data: data[:-4]), "length"),
    "noise": (lambda r: with_payload(r, lambda data: b"\xff" * len(data)), "length"),
    "empty": (lambda r: with_payload(r, lambda data: b""), "length"),
    "no array": (with_another_record, "malformed"),
    "examples": (with_metric("num_examples", 0), "malformed"),
    "loss": (with_metric("train_loss", float("nan")), "malformed"),
    "steps": (with_metric("steps", [0.0, 0.1]), "malformed"),
    "tokens": (with_metric("terms", float("inf")), "malformed"),
    "records": (without_records, "malformed"),
}


def at(client, round, fault):
    def spoil(message, reply):
        here = (message.metadata.dst_node_id - 100, message.content["job"]["round"])
        return fault(reply) if here == (client, round) else [reply]

    return spoil


@pytest.mark.parametrize("name", FAULTS)
def test_a_failing_client_counts_as_one_that_took_no_part(tmp_path, name, monkeypatch):
    fault, reason = FAULTS[name]
    if name == "error":  # an error replies to the message, not to the reply

        def spoil(message, reply):
            here = (message.metadata.dst_node_id - 100, message.content["job"]["round"])
            return [Message(Error(8, "killed"), reply_to=message)] if here == (1, 1) else [reply]

    else:
        spoil = at(1, 1, fault)
    run(tmp_path, Scaffold(), spoil, deadline_s=5.0, save_every=1, **INT8)
    report = history(tmp_path)[1]
    assert report.refused == (((1, reason),) if reason else ())
    assert report.dropped == (() if reason else (1,))
    assert not any(r.refused or r.dropped for r in history(tmp_path) if r.round != 2)
    monkeypatch.setattr(
        "fedpara_peft.federation.server.round.drop_outs",
        lambda cohort, probability, seed, round: [1] if round == 1 else [],
    )
    trainer = simulate(tmp_path, Scaffold(), **INT8)
    for folder in ("server", "simulated"):
        assert (tmp_path / folder / "checkpoint-4").is_dir()
    ours = load_file(tmp_path / "server" / "checkpoint-4" / "server.safetensors")
    theirs = load_file(tmp_path / "simulated" / "checkpoint-4" / "server.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_same_clients(tmp_path, trainer)


@pytest.mark.parametrize("terms", [1e39, 1e300])
def test_more_tokens_than_there_are_weigh_nothing(tmp_path, terms):
    run(tmp_path, spoil=at(1, 1, with_metric("terms", terms)), client_weighting="tokens")
    assert [report.refused for report in history(tmp_path)] == [(), ((1, "malformed"),), (), ()]


def test_a_run_over_flower_leaves_what_a_simulation_leaves(tmp_path):
    """Settings, history, ledger, a model card with the run in it, and a report from them."""
    run(tmp_path, Scaffold(), save_every=2)
    trainer = simulate(tmp_path, Scaffold())
    names = {"history.json", "ledger.npy", "settings.json", "checkpoint-2", "checkpoint-4"}
    for folder in ("server", "simulated"):
        assert names <= {path.name for path in (tmp_path / folder).iterdir()}
    ours, theirs = (
        json.loads((tmp_path / f / "settings.json").read_text()) for f in ("server", "simulated")
    )
    apart = ("identity", "arguments")  # nodes' data are not seen, and this one saves more often
    assert {n: v for n, v in ours.items() if n not in apart} == {
        n: v for n, v in theirs.items() if n not in apart
    }
    assert ours["identity"]["model"] == theirs["identity"]["model"]
    found = load_run(tmp_path / "server")
    assert found.settings["strategy"] == "Scaffold(server_learning_rate=1.0)"
    assert found.settings["clients"] == task.CLIENTS
    assert len(found.history) == 4
    write_report(tmp_path / "server", tmp_path / "report.html")
    assert "Scaffold" in (tmp_path / "report.html").read_text()
    card = (tmp_path / "server" / "model" / "README.md").read_text()
    trainer.save_model(tmp_path / "model")
    lines = [line for line in card.splitlines() if "rounds" in line or "strategy" in line]
    assert lines
    assert all(line in (tmp_path / "model" / "README.md").read_text() for line in lines)


def test_a_node_that_was_given_another_run_trains_nobody(tmp_path, caplog):
    args = task.arguments(tmp_path / "server")
    other = dataclasses.replace(args, learning_rate=0.5, quorum=0.9)  # the quorum is the server's
    apps = [
        client_app(task.model_fn, task.data_fn, other if client == 1 else args)
        for client in range(task.CLIENTS)
    ]
    run(tmp_path, apps=apps, deadline_s=1.0)
    assert all(report.dropped == (1,) for report in history(tmp_path))
    assert "refused: node 101 (client 1): learning_rate: 0.1 here, 0.5 there" in caplog.text
    assert "quorum:" not in caplog.text


def frozen_model(seed):
    """Another frozen base for every seed."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
    model[0].requires_grad_(False)
    return model


def test_an_introduction_that_nests_without_end_is_none():
    record = introduction_record(0, 3, {})
    record["introduction"]["facts"] = "[" * 100_000
    with pytest.raises(PayloadError, match="not an introduction"):
        read_introduction(record)


def test_nodes_with_another_frozen_base_stop_the_run_by_name(tmp_path):
    args = task.arguments(tmp_path / "server")
    apps = [client_app(lambda: frozen_model(1), task.data_fn, args) for _ in range(task.CLIENTS)]
    grid = LocalGrid(apps, tmp_path)
    server = server_app(lambda: frozen_model(2), args, task.CLIENTS, deadline_s=0.5)
    with pytest.raises(AgreementError, match=r"every node was given another run.*frozen base"):
        server(grid, Context(1, 1, {}, RecordDict(), {}))
    assert not (tmp_path / "server" / "model").exists()


def test_a_clients_own_exception_is_refused_by_its_node(tmp_path):
    def broken(client):
        data = task.data_fn(client)
        if client != 1:
            return data
        return Unreadable(data)

    args = task.arguments(tmp_path / "server")
    apps = [client_app(task.model_fn, broken, args) for _ in range(task.CLIENTS)]
    run(tmp_path, apps=apps)
    assert all(report.refused == ((1, "failed"),) for report in history(tmp_path))
    assert all(report.dropped == () for report in history(tmp_path))


class Unreadable(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        raise OSError("images/7.jpg is damaged")


def test_a_duplicate_is_refused_and_the_first_answer_is_used(tmp_path):
    run(tmp_path, spoil=at(1, 1, lambda reply: [reply, reply]), save_every=1)
    assert history(tmp_path)[1].refused == ((1, "duplicate"),)
    ours = load_file(tmp_path / "server" / "checkpoint-4" / "server.safetensors")
    simulate(tmp_path)
    theirs = load_file(tmp_path / "simulated" / "checkpoint-4" / "server.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("whole", [True, False])
def test_a_stale_answer_is_refused(tmp_path, whole):
    former = {}

    def spoil(message, reply):
        client, round = message.metadata.dst_node_id - 100, message.content["job"]["round"]
        kept = former.setdefault(client, (reply.content, payload_of(reply)))
        if (client, round) != (1, 2):
            return [reply]
        if whole:
            reply.content = kept[0]
            return [reply]
        return with_payload(reply, lambda data: kept[1])

    run(tmp_path, spoil=spoil)
    assert [r.refused for r in history(tmp_path)] == [(), (), ((1, "stale"),), ()]


def test_a_round_below_its_quorum_stops_the_run_with_the_last_good_model(tmp_path):
    with pytest.raises(RoundError, match="quorum"):
        run(tmp_path, spoil=at(1, 2, lambda reply: []), deadline_s=4.0, quorum=1.0)
    assert len(history(tmp_path)) == 2
    assert (tmp_path / "server" / "model" / "adapter_model.safetensors").is_file()


def test_an_update_beyond_the_norm_changes_nothing_on_its_node(tmp_path):
    with pytest.raises(RoundError, match="max_update_norm"):
        run(tmp_path, max_update_norm=1e-6, quorum=0.5)
    assert not list((tmp_path / "node-100").rglob("*.safetensors"))


def test_a_killed_server_continues_and_its_nodes_step_back(tmp_path):
    def kill(message, reply):
        if message.content["job"]["round"] == 3:
            raise KeyboardInterrupt
        return [reply]

    settings = {"save_every": 2, "num_rounds": 5, "clients_per_round": 2, **INT8}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Scaffold(), kill, **settings)
    with pytest.raises(ResumeError, match="resume_from_checkpoint=True"):
        run(tmp_path, Scaffold(), resume=False, **settings)
    run(tmp_path, Scaffold(), **settings)
    trainer = simulate(
        tmp_path, Scaffold(), **{k: v for k, v in settings.items() if k != "save_every"}
    )
    assert_same(tmp_path, trainer, 5)
    assert_same_clients(tmp_path, trainer)


def test_nodes_keep_their_optimizers_states_and_step_back_with_them(tmp_path):
    def kill(message, reply):
        if message.content["job"]["round"] == 3:
            raise KeyboardInterrupt
        return [reply]

    settings = {**KEEP, "num_rounds": 5}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, spoil=kill, save_every=2, **settings)
    run(tmp_path, save_every=2, **settings)
    trainer = simulate(tmp_path, **settings)
    assert trainer.client_state(0).optimizer.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert_same(tmp_path, trainer, 5)
    assert_same_clients(tmp_path, trainer)


def test_nothing_of_the_local_half_is_sent(tmp_path):
    grid = run(tmp_path, Scaffold())
    shared = load_file(tmp_path / "server" / "model" / "adapter_model.safetensors")
    wire = b"".join(payload_of(m) for m in grid.wire)
    assert sum(t.nbytes for t in shared.values()) > 0
    assert len(wire) == history(tmp_path).total_bytes
    for message in grid.wire:
        records = {n: set(r) for n, r in message.content.items() if n != "payload"}
        assert records in (
            {"job": {"run", "round", "kept", "needed"}},
            {"answer": {"round", "reason", "message"}, "metrics": {"num_examples", "train_loss"}},
        )
    looked = 0
    for client in range(task.CLIENTS):
        state = DiskStore(run_folder(tmp_path, client)).get(client)
        for tensor in state.local.values():
            values = tensor.contiguous().numpy().tobytes()
            for start in range(0, len(values) - 8, 8):
                looked += 1
                assert values[start : start + 8] not in wire
    assert looked > 100


@pytest.mark.programs
def test_a_worker_serves_all_messages_and_is_replaced_when_killed(tmp_path):
    args = task.arguments(tmp_path / "server", save_every=1, **INT8)
    apps = [client_app(task.model_fn, task.data_fn, args) for _ in range(task.CLIENTS)]
    apps[0] = client_app(task.model_fn, task.data_fn, args, worker=True, worker_idle_s=3.0)
    seen = []

    def kill(message, reply):
        client, round = message.metadata.dst_node_id - 100, message.content["job"]["round"]
        if client == 0:
            (endpoint,) = (tmp_path / "node-100" / "client-0" / "worker").glob("*.json")
            assert endpoint.stat().st_mode & 0o077 == 0
            assert endpoint.parent.stat().st_mode & 0o077 == 0
            seen.append(json.loads(endpoint.read_text())["process"])
            if round == 1:
                os.kill(seen[-1], signal.SIGKILL)
        return [reply]

    run(tmp_path, spoil=kill, apps=apps, deadline_s=60.0, save_every=1, **INT8)
    trainer = simulate(tmp_path, **INT8)
    assert_same(tmp_path, trainer)
    assert_same_clients(tmp_path, trainer)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    end = time.monotonic() + 30
    while list(tmp_path.rglob("worker/*.json")) and time.monotonic() < end:
        time.sleep(0.2)
    assert not list(tmp_path.rglob("worker/*.json"))  # idle, they ended


def test_a_worker_needs_functions_that_it_can_import(tmp_path):
    args = task.arguments(tmp_path / "server")
    app = client_app(lambda: task.model_fn(), task.data_fn, args, worker=True)
    grid = LocalGrid([app], tmp_path)
    with pytest.raises(ArgumentsError, match="worker=False"):
        app(Message(RecordDict(), 100, "query"), grid.context(100))


@pytest.mark.slow
def test_real_processes_on_loopback_end_as_the_simulation_does(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    example = root / "examples" / "flower"
    path = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, example / "federation.py", "--output_dir", tmp_path, "--num_rounds", "2"],
        env={**os.environ, "PYTHONPATH": path}, check=True, timeout=120,
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(example))
    digits = importlib.import_module("digits_app.task")
    folder = tmp_path / "simulated"
    args = digits.arguments({"output-dir": str(folder), "num-rounds": 2})
    trainer = FederatedTrainer(
        digits.model_fn(), args, digits.clients(), digits.test_set(), compute_metrics=accuracy
    )
    trainer.train()
    assert_same(tmp_path, trainer, 2)
    for client in range(digits.NUM_CLIENTS):
        (kept,) = (tmp_path / f"node-{client}" / f"client-{client}").glob("run-*")
        ours, theirs = DiskStore(kept).get(client), trainer.client_state(client)
        assert all(torch.equal(ours.local[name], theirs.local[name]) for name in theirs.local)


@pytest.mark.programs
def test_without_flower_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['flwr'] = None; import fedpara_peft\n"
        "import fedpara_peft.integrations.flower"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'fedpara-peft[flower]'" in found.stderr
    code = "import sys, fedpara_peft; sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
