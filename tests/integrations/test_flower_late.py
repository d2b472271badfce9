"""Flower nodes that answer late: an answer counts in the round in which it comes."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from tests.integrations import flower_task as task

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import Context, Error, Message, RecordDict
from tests.integrations.test_flower import (  # noqa: F401
    LocalGrid,
    _task,
    assert_same_clients,
    payload_of,
    run_folder,
    with_payload,
)

from fedpara_peft import ArgumentsError, FedAvgM, FederatedTrainer, History, accuracy
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.federation.folder.store import DiskStore
from fedpara_peft.integrations.flower import client_app, server_app


class Clockwork(LocalGrid):
    """Nodes take their seconds by a clock that goes on when somebody is waited for."""

    def __init__(self, apps, tmp_path, seconds, spoil=None):
        super().__init__(apps, tmp_path, spoil)
        self.seconds, self.clock, self.due = seconds, 0.0, {}

    def push_messages(self, messages):
        messages = list(messages)
        names = super().push_messages(messages)
        for name, message in zip(names, messages, strict=True):
            training = message.metadata.message_type == "train"
            client = message.metadata.dst_node_id - 100
            self.due[name] = self.clock + self.seconds[client] if training else 0.0
        return names

    def pull_messages(self, message_ids):
        asked = [name for name in message_ids if self.replies.get(name)]
        if not asked:
            return []
        # Whoever answers at the same time as another: first who was asked first.
        first = min(asked, key=lambda name: (self.due[name], int(name)))
        self.clock = max(self.clock, self.due[first])
        return self.replies.pop(first)


SECONDS = [1.0, 4.3, 1.9]


def run(tmp_path, seconds=SECONDS, spoil=None, deadline_s=5.0, num_rounds=7, **more):
    """A run over a grid whose nodes take their time."""
    settings = {"buffer_size": 1, "num_rounds": num_rounds, "save_every": 1, **more}
    args = task.arguments(tmp_path / "server", **settings)
    apps = [
        client_app(task.model_fn, task.data_fn, args, strategy=FedAvgM())
        for _ in range(task.CLIENTS)
    ]
    server = server_app(
        task.model_fn, args, task.CLIENTS, strategy=FedAvgM(), eval_data_fn=task.data,
        compute_metrics=accuracy, deadline_s=deadline_s,
    )  # fmt: skip
    grid = Clockwork(apps, tmp_path, seconds, spoil)
    server(grid, Context(1, 1, {}, RecordDict(), {}))
    return grid


def history(tmp_path):
    return History.load(tmp_path / "server" / "history.json")


def simulate(tmp_path, seconds=SECONDS, num_rounds=7, **more):
    settings = {"buffer_size": 1, "num_rounds": num_rounds, "save_every": 1, **more}
    trainer = FederatedTrainer(
        task.model_fn(), task.arguments(tmp_path / "simulated", **settings), task.clients(),
        task.data(), strategy=FedAvgM(), compute_metrics=accuracy, client_seconds=seconds,
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_same(tmp_path, trainer, rounds=7):
    ours, theirs = (
        load_file(tmp_path / where / f"checkpoint-{rounds}" / "server.safetensors")
        for where in ("server", "simulated")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    timeless = {"seconds": 0.0, "slowest_client_s": None, "clock_s": None}
    plain = [dataclasses.replace(r, **timeless) for r in history(tmp_path)]
    assert plain == [dataclasses.replace(r, **timeless) for r in trainer.history]
    ledger = Ledger.load(tmp_path / "server" / "ledger.npy")
    assert list(ledger.transfers()) == list(trainer.ledger.transfers())


@pytest.mark.parametrize(
    ("more", "oldest"),
    [
        ({}, (2, 7)),
        ({"buffer_size": 2, "staleness_exponent": 1.0}, (1, 7)),
        ({"max_staleness": 1}, (1, 1)),
        ({"uplink_codec": "int8", "downlink_codec": "int8", "error_feedback": True}, (2, 7)),
        ({"buffer_size": 3}, (0, 0)),
    ],
)
def test_the_result_is_the_simulations(tmp_path, more, oldest):
    """Whose answer comes when is the same here as there; so is everything else, bit for bit."""
    run(tmp_path, **more)
    trainer = simulate(tmp_path, **more)
    assert_same(tmp_path, trainer)
    ages = [r.staleness_max for r in trainer.history if r.staleness_max is not None]
    assert oldest[0] <= max(ages) <= oldest[1]
    if more.get("max_staleness"):
        assert ((1, "stale"),) in [r.refused for r in trainer.history]


def test_a_late_answer_of_another_round_than_its_job_is_refused(tmp_path):
    former = {}

    def spoil(message, reply):
        client, round = message.metadata.dst_node_id - 100, message.content["job"]["round"]
        kept = former.setdefault(client, payload_of(reply))
        if client == 0 and round == 3:
            return with_payload(reply, lambda data: kept)
        return [reply]

    run(tmp_path, spoil=spoil)
    refused = [pair for r in history(tmp_path) for pair in r.refused]
    assert refused == [(0, "stale")]


def test_a_duplicate_and_a_failure_are_no_updates(tmp_path):
    def spoil(message, reply):
        client, round = message.metadata.dst_node_id - 100, message.content["job"]["round"]
        if (client, round) == (0, 0):
            return [reply, reply]
        if (client, round) == (2, 0):
            return [Message(Error(2, "gone"), reply_to=message)]
        return [reply]

    run(tmp_path, spoil=spoil, buffer_size=2)
    first, *others = history(tmp_path)
    assert first.refused == ((0, "duplicate"),)
    assert first.dropped == (2,)
    assert set(first.cohort) == {0, 1, 2}
    assert all(not r.dropped for r in others)


def test_a_node_that_never_answers_is_given_up_after_its_deadline(tmp_path):
    def spoil(message, reply):
        silent = message.metadata.dst_node_id == 101 and message.content["job"]["round"] == 0
        return [] if silent else [reply]

    run(tmp_path, spoil=spoil, deadline_s=1.5, buffer_size=3, num_rounds=3, eval_every=0)
    assert [r.dropped for r in history(tmp_path)] == [(1,), (), ()]
    assert history(tmp_path)[0].seconds > 1.4


def test_a_killed_server_continues_without_what_was_on_its_way(tmp_path):
    """The nodes step back to what the checkpoint speaks of."""
    states = {}

    def kill(message, reply):
        round = message.content["job"]["round"]
        if round == 4:
            for client in range(task.CLIENTS):
                store = DiskStore(run_folder(tmp_path, client))
                states[client] = store.get(client)
            raise KeyboardInterrupt
        return [reply]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, spoil=kill)
    before = history(tmp_path)
    run(tmp_path)
    found = history(tmp_path)
    assert found.rounds[:4] == before.rounds
    used = {c for r in before for c in r.cohort}
    lost = [c for c in (0, 1, 2) if c not in used]
    assert 1 in lost
    assert set(found[4].dropped) >= set(lost)  # and may be drawn again from the next round on
    assert len(found) == 7
    down = [
        t.client for t in Ledger.load(tmp_path / "server" / "ledger.npy").transfers(6, "downlink")
    ]
    assert 1 in down


def test_seconds_of_a_simulated_clock_are_none_of_a_servers(tmp_path):
    with pytest.raises(ArgumentsError, match="client_seconds_sigma is of a simulated clock"):
        run(tmp_path, client_seconds_sigma=0.5)
