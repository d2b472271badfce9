"""Secure aggregation over Flower: the simulation's sum, and nothing in the clear on the wire."""

import dataclasses
import json
import logging
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedpara_peft import (
    ArgumentsError,
    FedAvg,
    FedDyn,
    FederatedTrainer,
    History,
    RoundError,
    Scaffold,
    SecureAggregationError,
    accuracy,
)
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.comm.secure.client import SecureClient
from fedpara_peft.comm.secure.messages import HEADER_BYTES, Kind
from fedpara_peft.comm.secure.server import SecureServer
from fedpara_peft.comm.state import communicated_state
from fedpara_peft.federation.secure.fit import agreement_of

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from tests.federation.test_resume import InterruptedTestError, StopAfter
from tests.integrations import flower_task
from tests.integrations import secure_task as task
from tests.integrations.test_flower import LocalGrid, payload_of, with_payload

from fedpara_peft.integrations.engine.jobs import Answer, Job
from fedpara_peft.integrations.engine.node import NodeSetup
from fedpara_peft.integrations.flower import client_app, server_app, worker
from fedpara_peft.integrations.flower.messages import job_record, read_answer


@pytest.fixture(autouse=True)
def _task(monkeypatch):
    """What Flower sets in the process of a server app."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def run(tmp_path, strategy=None, spoil=None, deadline_s=60.0, apps=None, callbacks=(), **more):
    """A run over a grid: the grid."""
    args = task.arguments(tmp_path / "server", **more)
    if apps is None:
        app = client_app(task.model_fn, task.data_fn, args, strategy=strategy)
        apps = [app] * task.CLIENTS
    grid = LocalGrid(apps, tmp_path, spoil)
    server = server_app(
        task.model_fn, args, task.CLIENTS, strategy=strategy, eval_data_fn=flower_task.data,
        compute_metrics=accuracy, deadline_s=deadline_s, callbacks=callbacks,
    )  # fmt: skip
    server(grid, Context(1, 1, {}, RecordDict(), {}))
    return grid


class Forgetful:
    """A client app as Flower runs it: a new process for every message, so nothing is in memory."""

    def __init__(self, args, strategy=None, **more):
        self.given = args, strategy, more

    def __call__(self, message, context):
        args, strategy, more = self.given
        app = client_app(task.model_fn, task.data_fn, args, strategy=strategy, **more)
        return app(message, context)


def simulate(tmp_path, strategy=None, **more):
    args = task.arguments(tmp_path / "simulated", **{"save_every": 1, **more})
    trainer = FederatedTrainer(
        task.model_fn(), args, task.clients(), flower_task.data(), strategy=strategy,
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    return trainer


def history(tmp_path):
    return History.load(tmp_path / "server" / "history.json")


def assert_same_state(tmp_path, rounds=2):
    ours = load_file(tmp_path / "server" / f"checkpoint-{rounds}" / "server.safetensors")
    theirs = load_file(tmp_path / "simulated" / f"checkpoint-{rounds}" / "server.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def wants(message):
    return message.content["secure"]["wants"] if "secure" in message.content else ""


def at(client, round, wanted, fault):
    """Do something to one answer of one client."""

    def spoil(message, reply):
        here = message.metadata.dst_node_id - 100, message.content["job"]["round"], wants(message)
        return fault(message, reply) if here == (client, round, wanted) else [reply]

    return spoil


def lost(message, reply):
    """The node says that it failed: nobody need wait for it."""
    return [Message(Error(8, "killed"), reply_to=message)]


def left(tmp_path):
    return sorted(path.name for path in tmp_path.rglob("secure-*"))


def drop(monkeypatch, *dropped):
    """In the simulation these clients drop out of the second round before their updates."""
    monkeypatch.setattr(
        "fedpara_peft.federation.server.round.drop_outs",
        lambda cohort, probability, seed, round: list(dropped) if round == 1 else [],
    )


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (FedAvg(), {"secure_max_examples": 64}),
        (FedDyn(), {"clients_per_round": 3, "secure_bits": 8, "downlink_codec": "float16"}),
        (FedAvg(), {"factor_schedule": "one_block", "clip_update_norm": 0.3}),
    ],
)
def test_a_masked_sum_over_flower_is_the_simulations(tmp_path, strategy, more):
    args = task.arguments(tmp_path / "server", **more)
    apps = [Forgetful(args, strategy) for _ in range(task.CLIENTS)]
    run(tmp_path, strategy, apps=apps, save_every=1, **more)
    trainer = simulate(tmp_path, strategy, **more)
    assert_same_state(tmp_path)
    timeless = {"seconds": 0.0, "slowest_client_s": None}
    plain = [dataclasses.replace(r, **timeless) for r in history(tmp_path)]
    assert plain == [dataclasses.replace(r, **timeless) for r in trainer.history]
    ledger = Ledger.load(tmp_path / "server" / "ledger.npy")
    assert list(ledger.transfers()) == list(trainer.ledger.transfers())
    assert left(tmp_path) == []


def test_the_bytes_counted_are_those_that_passed(tmp_path):
    grid = run(tmp_path)
    asked = [m for m in grid.wire if "job" in m.content]
    down = sum(len(payload_of(m)) + len(m.content["secure"]["message"]) for m in asked)
    up = sum(len(payload_of(m)) for m in grid.wire if "answer" in m.content)
    reports = history(tmp_path)
    assert down == sum(r.downlink_bytes for r in reports)
    assert up == sum(r.uplink_bytes for r in reports)
    kinds = [wants(m) for m in asked if m.content["job"]["round"] == 0]
    assert kinds == [k for k in ("KEYS", "SHARES", "MASKED", "UNMASKING") for _ in range(4)]


def test_recorded_messages_hold_no_update(tmp_path, monkeypatch):
    """All records of all messages, searched for every update: float, quantized or packed."""
    updates, mask = [], SecureClient.mask

    def overhear(self, data, values, weight, loss):
        updates.append((self._agreed, values, weight, loss))
        return mask(self, data, values, weight, loss)

    monkeypatch.setattr(SecureClient, "mask", overhear)
    grid = run(tmp_path, secure_max_examples=40)
    assert len(updates) == 8
    traffic = b"|".join(everything(m.content) for m in grid.wire)
    assert len(traffic) > history(tmp_path).total_bytes
    masked = [payload_of(m) for m in grid.wire if "answer" in m.content]
    masked = [data for data in masked if data[5] == Kind.MASKED]
    assert len(masked) == 8
    for agreed, values, weight, loss in updates:
        needles = [agreed.vector(values, weight, loss).pack()[:64]]
        scaled = values * weight
        for dtype in ("<i1", "<u1", "<i2", "<i4", "<i8"):
            needles += [v.astype(dtype).tobytes()[:32] for v in (scaled, values, scaled[::-1])]
        real = (values / agreed.levels * task.SECURE["secure_clip"]).astype(np.float64)
        needles += [real.astype(dtype).tobytes()[:32] for dtype in ("<f2", "<f4", "<f8")]
        assert not any(needle in traffic for needle in needles)
        for data in masked:
            words = agreed.unpack(data[HEADER_BYTES:]).values
            assert (agreed.values.integers(words) == scaled).mean() < 0.05
    for message in grid.wire:  # nor a single client's loss or examples
        if "answer" in message.content:
            assert message.content["metrics"] == {"num_examples": 0, "train_loss": 0.0}


def everything(content):
    """A message's records as bytes, arrays and configuration alike."""
    found = []
    for record in content.values():
        for value in record.values():
            found.append(value if isinstance(value, bytes) else getattr(value, "data", b""))
            found.append(repr(value).encode())
    return b"|".join(found)


@pytest.mark.parametrize("wanted", ["KEYS", "SHARES", "MASKED"])
def test_a_client_that_drops_out_before_its_update_is_not_in_the_sum(tmp_path, monkeypatch, wanted):
    run(tmp_path, FedDyn(), at(1, 1, wanted, lost), save_every=1)
    assert [r.dropped for r in history(tmp_path)] == [(), (1,)]
    drop(monkeypatch, 1)
    trainer = simulate(tmp_path, FedDyn())
    assert [r.dropped for r in trainer.history] == [(), (1,)]
    assert_same_state(tmp_path)


def test_a_client_that_drops_out_after_masking_is_in_the_sum(tmp_path):
    run(tmp_path, FedDyn(), at(1, 1, "UNMASKING", lost), save_every=1)
    assert [r.dropped for r in history(tmp_path)] == [(), ()]
    simulate(tmp_path, FedDyn())
    assert_same_state(tmp_path)


def test_below_the_threshold_the_round_stops_and_shows_nothing(tmp_path):
    def unhelpful(message, reply):
        gone = wants(message) == "UNMASKING" and reply_client(message) != 0
        return lost(message, reply) if gone else [reply]

    with pytest.raises(SecureAggregationError, match="1 of 4 clients helped to unmask") as found:
        run(tmp_path, spoil=unhelpful)
    assert "quorum=0" in " ".join(found.value.__notes__)
    assert not (tmp_path / "server" / "history.json").exists() or not len(history(tmp_path))


def reply_client(message):
    return message.metadata.dst_node_id - 100


def test_with_quorum_0_such_a_round_changes_nothing(tmp_path, caplog):

    def unhelpful(message, reply):
        gone = message.content["job"]["round"] == 1 and wants(message) == "UNMASKING"
        return lost(message, reply) if gone and reply_client(message) > 1 else [reply]

    with caplog.at_level(logging.WARNING):
        run(tmp_path, FedDyn(), unhelpful, save_every=1, quorum=0.0)
    reports = history(tmp_path)
    assert [c for c, reason in reports[1].refused if reason == "unsummed"] == [0, 1, 2, 3]
    assert reports[1].train_loss is None
    assert "round 2 changes nothing" in caplog.text
    one, two = (
        load_file(tmp_path / "server" / f"checkpoint-{n}" / "server.safetensors") for n in (1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_node_is_told_that_a_round_without_a_sum_was_none(tmp_path):
    kept = {}

    def unhelpful(message, reply):
        job = message.content["job"]
        kept.setdefault(job["round"], set()).add(job["kept"])
        gone = job["round"] == 1 and wants(message) == "UNMASKING"
        return lost(message, reply) if gone else [reply]

    run(tmp_path, spoil=unhelpful, quorum=0.0, num_rounds=3)
    assert kept == {0: {0}, 1: {1}, 2: {1}}


@pytest.mark.parametrize("wanted", ["KEYS", "SHARES", "MASKED"])
def test_a_late_answer_of_an_earlier_round_is_refused(tmp_path, wanted, monkeypatch):
    former = []

    def spoil(message, reply):
        if reply_client(message) != 2 or wants(message) != wanted:
            return [reply]
        former.append(reply.content)
        if message.content["job"]["round"] == 1:
            reply.content = former[0]
        return [reply]

    run(tmp_path, spoil=spoil, save_every=1)
    assert [r.refused for r in history(tmp_path)] == [(), ((2, "stale"),)]
    drop(monkeypatch, 2)
    simulate(tmp_path)
    assert_same_state(tmp_path)


@pytest.mark.parametrize("wanted", ["KEYS", "SHARES", "MASKED"])
def test_bytes_of_an_earlier_round_in_a_new_answer_are_refused(tmp_path, wanted):
    former = []

    def spoil(message, reply):
        if reply_client(message) != 2 or wants(message) != wanted:
            return [reply]
        former.append(payload_of(reply))
        return with_payload(reply, lambda data: former[0])

    run(tmp_path, spoil=spoil)
    assert [r.refused for r in history(tmp_path)] == [(), ((2, "stale"),)]


def test_a_useless_unmasking_answer_is_passed_over_and_logged(tmp_path, caplog):
    cut = at(3, 1, "UNMASKING", lambda m, r: with_payload(r, lambda data: data[:-3]))
    run(tmp_path, spoil=cut, save_every=1)
    assert [r.refused for r in history(tmp_path)] == [(), ()]
    assert "client 3 does not help to unmask: payload refused (length)" in caplog.text
    simulate(tmp_path)
    assert_same_state(tmp_path)


def test_a_killed_server_continues_with_fresh_secrets(tmp_path):
    more = {"save_every": 1}
    with pytest.raises(InterruptedTestError):
        run(tmp_path, FedDyn(), callbacks=[StopAfter(1)], **more)
    run(tmp_path, FedDyn(), **more)
    simulate(tmp_path, FedDyn())
    assert_same_state(tmp_path)
    assert left(tmp_path) == []


# What a node keeps between two messages.


def node(tmp_path, client=0, **more):
    app = client_app(task.model_fn, task.data_fn, task.arguments(tmp_path / "node", **more))
    return app, LocalGrid([], tmp_path)


def ask(app, grid, client, wanted, message=b"", cohort=(), round=0, payload=b""):
    job = Job(
        "0" * 16, round, 0, (0,), payload, wants=wanted, cohort=tuple(cohort), message=message
    )
    reply = app(Message(job_record(job), 100 + client, "train"), grid.context(100 + client))
    return read_answer(reply.content)


def test_secrets_rest_in_a_file_of_the_nodes_user_alone(tmp_path):
    app, grid = node(tmp_path)
    found = ask(app, grid, 0, "KEYS", cohort=(0, 1, 2))
    assert found.payload[5] == Kind.KEYS
    (file,) = tmp_path.rglob("secure-*")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    secrets = json.loads(json.loads(file.read_text())["machine"])["secrets"]
    assert len(secrets) == 3
    for secret in secrets:
        assert bytes.fromhex(secret) not in found.payload


def test_the_next_rounds_start_replaces_what_was_left(tmp_path):
    app, grid = node(tmp_path)
    one = ask(app, grid, 0, "KEYS", cohort=(0, 1, 2))
    (file,) = tmp_path.rglob("secure-*")
    before = file.read_text()
    (file.parent / f"{file.stem}.1-2.taken").write_text("of a process that was killed")
    two = ask(app, grid, 0, "KEYS", cohort=(0, 1, 2), round=1)
    assert left(tmp_path) == [file.name]
    assert file.read_text() != before
    assert one.payload[26:] != two.payload[26:]


def rounds_messages(tmp_path, clients=(0, 1, 2)):
    """Nodes of a cohort up to their sealed shares: what each was told, and said."""
    app, grid = node(tmp_path)
    args = task.arguments(tmp_path / "node")
    shared = communicated_state(task.model_fn())
    schema = schema_of({name: shared[name] for name in sorted(shared)})
    server = SecureServer(agreement_of(args, FedAvg(), 0, clients, schema))
    for client in clients:
        server.keys(client, ask(app, grid, client, "KEYS", cohort=clients).payload)
    keys = server.all_keys()
    for client in clients:
        server.shares(client, ask(app, grid, client, "SHARES", keys).payload)
    return app, grid, server, keys


def test_a_message_is_answered_once_by_however_many_processes(tmp_path):
    app, grid, _, keys = rounds_messages(tmp_path)
    again = ask(app, grid, 0, "SHARES", keys)
    assert (again.reason, again.payload) == ("failed", b"")
    assert "answered once, and in order" in again.message
    early = ask(app, grid, 0, "UNMASKING", b"x" * 40)
    assert early.reason == "malformed"


def test_a_message_of_an_earlier_round_is_refused_by_its_node(tmp_path):
    app, grid, _, keys = rounds_messages(tmp_path)
    late = ask(app, grid, 0, "SHARES", keys, round=1)
    assert late.reason == "stale"
    assert left(tmp_path / "node-100")  # and the round at work goes on


def test_a_node_that_was_never_asked_for_keys_masks_nothing(tmp_path):
    app, grid = node(tmp_path)
    found = ask(app, grid, 0, "MASKED", b"x" * 40, payload=b"y" * 40)
    assert (found.reason, found.payload) == ("stale", b"")
    assert "no secrets of this round" in found.message


def test_an_update_in_the_clear_is_not_given(tmp_path):
    app, grid = node(tmp_path)
    found = ask(app, grid, 0, "", payload=b"y" * 40)
    assert (found.reason, found.payload) == ("malformed", b"")
    assert "an update in the clear is asked for" in found.message
    plain = task.arguments(tmp_path / "node", secure_aggregation=False, secure_clip=None)
    found = ask(Forgetful(plain), grid, 0, "KEYS", cohort=(0, 1, 2))
    assert "secure_aggregation=False" in found.message


def test_a_client_outside_the_cohort_and_small_thresholds_are_refused(tmp_path):
    app, grid = node(tmp_path)
    for cohort, said in (((1, 2, 3), "not of the cohort"), ((0,), "hides nothing")):
        found = ask(app, grid, 0, "KEYS", cohort=cohort)
        assert found.reason == "failed"
        assert said in found.message


def test_a_worker_gets_the_jobs_that_its_node_got(tmp_path, monkeypatch):
    """As JSON through a socket: the round's messages to the byte."""
    setup = NodeSetup(task.model_fn, task.data_fn, task.arguments(tmp_path), str(tmp_path))
    job = Job(
        "0" * 16,
        3,
        2,
        (1, 2),
        b"\0\xff",
        wants="SHARES",
        cohort=(0, 4, 7),
        message=bytes(range(256)),
    )
    got, sent = [], []

    class Wire:
        def __init__(self, *parts):
            self.recv_bytes = iter(parts).__next__
            self.send_bytes = sent.append

    class Listening:
        def train(self, client, job):
            got.append((client, job))
            return Answer(3, payload=b"masked")

    def ask(self, client, request, payload):
        worker._serve(Listening(), Wire(json.dumps(request | {"client": client}).encode(), payload))
        return json.loads(sent[0]), sent[1]

    monkeypatch.setattr(worker.RemoteNode, "_ask", ask)
    found = worker.RemoteNode(setup, 1.0).train(5, job)
    assert got == [(5, job)]
    assert found.payload == b"masked"


def test_what_a_sum_cannot_have_is_refused_on_both_ends(tmp_path, monkeypatch):
    with pytest.raises(ArgumentsError, match="Scaffold: what it sends beside the update"):
        run(tmp_path, Scaffold())
    with pytest.raises(ArgumentsError, match="unmask_drop_out_probability is of a simulation"):
        run(tmp_path, unmask_drop_out_probability=0.1)
    monkeypatch.setattr(task, "model_fn", flower_task.model_fn)
    app, grid = node(tmp_path)
    with pytest.raises(ArgumentsError, match=r"buffers, first .*group norm"):
        app(Message(RecordDict(), 100, "query"), grid.context(100))


def test_a_secure_message_that_is_none_is_refused(tmp_path):
    app, grid = node(tmp_path)
    record = job_record(Job("0" * 16, 0, 0, (0,), b"", wants="KEYS", cohort=(0, 1, 2)))
    record["secure"] = ConfigRecord({"wants": "KEYS", "cohort": [-1, 2], "message": b""})
    reply = app(Message(record, 100, "train"), grid.context(100))
    assert reply.content["answer"]["reason"] == "malformed"


@pytest.mark.parametrize("wanted", ["KEYS", "SHARES", "MASKED"])
def test_when_nobody_answers_the_round_stops_at_the_deadline(tmp_path, wanted):
    with pytest.raises(SecureAggregationError, match=r"0 of 4 clients .* threshold is 3"):
        run(tmp_path, spoil=lambda m, r: [] if wants(m) == wanted else [r], deadline_s=1.0)


def test_when_all_diverge_the_run_says_so_as_ever(tmp_path):
    with pytest.raises(RoundError, match=r"updates of the round were refused.*diverged"):
        run(tmp_path, learning_rate=1e30)
