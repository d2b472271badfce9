"""Flower: the same run as the simulation's, bit for bit, whoever fails to answer."""

import dataclasses
import itertools
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, load_file

from fedpara_peft import (
    FedAdam,
    FedAvg,
    FederatedTrainer,
    History,
    LocalOnly,
    RoundError,
    Scaffold,
    accuracy,
)
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.federation.store import DiskStore

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedpara_peft.integrations.flower import client_app, server_app
from tests.integrations import flower_task as task

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


def run(tmp_path, strategy=None, spoil=None, deadline_s=5.0, apps=None, resume=True, **more):
    """A run over a grid: the grid, and what the server left in its folder."""
    args = task.arguments(tmp_path / "server", **more)
    apps = apps or [
        client_app(task.model_fn, task.data_fn, args, strategy=strategy)
        for _ in range(task.CLIENTS)
    ]
    grid = LocalGrid(apps, tmp_path, spoil)
    server = server_app(
        task.model_fn, args, task.CLIENTS, strategy=strategy, eval_data_fn=task.data,
        compute_metrics=accuracy, deadline_s=deadline_s, resume=resume,
    )  # fmt: skip
    server(grid, Context(1, 1, {}, RecordDict(), {}))
    return grid


def history(tmp_path):
    return History.load(tmp_path / "server" / "history.json")


def simulate(tmp_path, strategy=None, **more):
    args = task.arguments(tmp_path / "simulated", save_every=1, **more)
    trainer = FederatedTrainer(
        task.model_fn(), args, task.clients(), task.data(), strategy=strategy,
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_same(tmp_path, trainer, rounds=4):
    ours = load_file(tmp_path / "server" / f"checkpoint-{rounds}" / "server.safetensors")
    theirs = load_file(tmp_path / "simulated" / f"checkpoint-{rounds}" / "server.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain = [dataclasses.replace(r, seconds=0.0) for r in history(tmp_path)]
    assert plain == [dataclasses.replace(r, seconds=0.0) for r in trainer.history]
    ledger = Ledger.load(tmp_path / "server" / "ledger.npy")
    assert list(ledger.transfers()) == list(trainer.ledger.transfers())


def run_folder(tmp_path, client):
    (folder,) = (tmp_path / f"node-{100 + client}" / f"client-{client}").glob("run-*")
    return folder


def assert_same_clients(tmp_path, trainer):
    for client in range(task.CLIENTS):
        ours, theirs = (
            DiskStore(run_folder(tmp_path, client)).get(client),
            trainer._store.get(client),
        )
        for part in ("local", "residual"):
            found, expected = getattr(ours, part), getattr(theirs, part)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (FedAvg(), {}),
        (FedAvg(), {"clients_per_round": 2, "clip_update_norm": 0.1}),
        (Scaffold(), {"clients_per_round": 2}),
        (FedAvg(), INT8),
        (Scaffold(), {**INT8, "clients_per_round": 2, "client_sampling": "weighted"}),
        (FedAdam(), {"factor_schedule": "one_block", "aggregation": "median"}),
        (FedAvg(), {"dp_noise_multiplier": 0.5, "clip_update_norm": 1.0}),
        (LocalOnly(), {}),
    ],
)
def test_the_result_is_the_simulations(tmp_path, strategy, more):
    run(tmp_path, strategy, save_every=1, **more)
    trainer = simulate(tmp_path, strategy, **more)
    assert_same(tmp_path, trainer)
    assert_same_clients(tmp_path, trainer)
