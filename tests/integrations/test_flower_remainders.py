"""Flower nodes that follow the remainders of the exact average, and the norm of a moving clip."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.integrations import flower_task as task
from torch import nn

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from tests.integrations.test_flower import (  # noqa: F401
    INT8,
    _task,
    assert_same,
    at,
    history,
    payload_of,
    run,
    run_folder,
    simulate,
)

from fedpara_peft import FedAvgM, FederatedTrainer, FedProx, Scaffold
from fedpara_peft.comm.errors import PayloadError
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.federation.server.averaging import ExactAverage
from fedpara_peft.integrations.flower import client_app

EXACT = {"exact_average": True}


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr(task, "model_fn", task.wide_model_fn)


def sent_bytes(grid):
    return sum(len(payload_of(message)) for message in grid.wire)


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (None, {}),
        (FedAvgM(), {"clients_per_round": 1, "num_rounds": 7}),
        (Scaffold(), {**INT8, "clients_per_round": 2}),
        (FedProx(0.1), {"clients_per_round": 2, "max_update_norm": 2.0}),  # refuses some
    ],
)  # fmt: skip
def test_the_exact_average_over_nodes_is_the_simulations(tmp_path, strategy, more):
    """Every bit of it, and every byte, of nodes that take part in some of the rounds, too."""
    grid = run(tmp_path, strategy, save_every=1, **EXACT, **more)
    rounds = more.get("num_rounds", 4)
    trainer = simulate(tmp_path, strategy, **EXACT, **more)
    assert_same(tmp_path, trainer, rounds)
    assert sent_bytes(grid) == history(tmp_path).total_bytes
    at_end = load_file(tmp_path / "server" / f"checkpoint-{rounds}" / "server.safetensors")
    rests = {n: t for n, t in at_end.items() if "fedpara_remainder" in n}
    assert rests
    assert all(bool(t.any()) for t in rests.values())


def test_nodes_of_ranks_of_their_own_follow_the_same_remainders(tmp_path):
    task.model_fn = lambda: task.wide_model_fn(3)
    ranks = [1, 2, 3]
    run(tmp_path, save_every=1, ranks=ranks, clients_per_round=2, **EXACT)
    trainer = simulate(tmp_path, ranks=ranks, clients_per_round=2, **EXACT)
    assert_same(tmp_path, trainer)


def watched(monkeypatch):
    """By round and client, the remainders that nodes train with."""
    found = {}
    followed = ExactAverage.followed

    def follow(self, caught, data, round, own):
        rests = followed(self, caught, data, round, own)
        found[round].append((caught.rounds, caught.since, rests))
        return rests

    found.update({number: [] for number in range(20)})
    monkeypatch.setattr(ExactAverage, "followed", follow)
    return found


def test_each_node_trains_with_the_servers_remainders_however_it_came_by_them(
    tmp_path, monkeypatch
):
    """By none, by the terms of one round or of several, and whole."""
    found = watched(monkeypatch)
    run(tmp_path, save_every=1, clients_per_round=1, num_rounds=12, **EXACT)
    kinds = set()
    for number, followed in found.items():
        for rounds, since, rests in followed:
            kinds.add(None if rounds is None else min(len(rounds), 2))
            assert since <= number
            if number:
                file = tmp_path / "server" / f"checkpoint-{number}" / "server.safetensors"
                server = load_file(file)
                assert all(torch.equal(t, server[f"params/{n}"]) for n, t in rests.items())
    assert kinds == {None, 0, 1, 2}


def test_a_node_that_was_silent_catches_up(tmp_path, monkeypatch):
    """What it trained in vain is forgotten, and what it missed is sent, as in the simulation."""
    run(tmp_path, spoil=at(1, 1, lambda reply: []), deadline_s=2.0, save_every=1, **EXACT)
    assert history(tmp_path)[1].dropped == (1,)
    monkeypatch.setattr(
        "fedpara_peft.federation.server.round.drop_outs",
        lambda cohort, probability, seed, round: [1] if round == 1 else [],
    )
    assert_same(tmp_path, simulate(tmp_path, **EXACT))


def test_a_node_that_lost_its_folder_is_sent_all_in_the_same_round(tmp_path, caplog):
    """The result is that of a run in which nothing was lost, for the bytes of a second message."""

    def lose(message, reply):
        if message.metadata.dst_node_id == 101 and message.content["job"]["round"] == 1:
            shutil.rmtree(tmp_path / "node-101")
        return [reply]

    grid = run(tmp_path, spoil=lose, save_every=1, **EXACT)
    simulate(tmp_path, **EXACT)
    for folder in ("server", "simulated"):
        assert (tmp_path / folder / "checkpoint-4").is_dir()
    ours = load_file(tmp_path / "server" / "checkpoint-4" / "server.safetensors")
    theirs = load_file(tmp_path / "simulated" / "checkpoint-4" / "server.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(report.refused or report.dropped for report in history(tmp_path))
    assert "clients [1] have lost their remainders" in caplog.text
    # It trained in round 2, and its folder went; in round 3 it is asked twice.
    ledger = Ledger.load(tmp_path / "server" / "ledger.npy")
    downlink = [t for t in ledger.transfers() if t.direction == "downlink"]
    assert [t.client for t in downlink if t.round == 3] == [0, 1, 2, 1]
    told = [m for m in grid.wire if m.metadata.message_type == "train" and "job" in m.content]
    assert len(told) == len(downlink)
    assert sent_bytes(grid) == ledger.total_bytes()


def test_a_node_that_always_says_that_it_is_behind_is_refused_by_name(tmp_path):
    """Its word costs a second message a round, and nothing that others see."""

    def lie(message, reply):
        if message.metadata.dst_node_id == 101:
            reply.content["answer"]["reason"] = "behind"
        return [reply]

    run(tmp_path, spoil=lie, save_every=1, quorum=0.5, **EXACT)
    assert all(report.refused == ((1, "behind"),) for report in history(tmp_path))


def test_a_killed_server_continues_and_its_nodes_step_back_to_its_remainders(tmp_path):
    def kill(message, reply):
        if message.content["job"]["round"] == 3:
            raise KeyboardInterrupt
        return [reply]

    settings = {"save_every": 2, "num_rounds": 5, "clients_per_round": 2, **EXACT}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, spoil=kill, **settings)
    run(tmp_path, **settings)
    trainer = simulate(tmp_path, num_rounds=5, clients_per_round=2, **EXACT)
    assert_same(tmp_path, trainer, 5)


@pytest.mark.programs
def test_a_worker_follows_them_too(tmp_path):
    args = task.arguments(tmp_path / "server", save_every=1, num_rounds=2, **EXACT)
    apps = [
        client_app(task.wide_model_fn, task.data_fn, args, worker=client == 0, worker_idle_s=3.0)
        for client in range(task.CLIENTS)
    ]
    run(tmp_path, apps=apps, deadline_s=90.0, save_every=1, num_rounds=2, **EXACT)
    assert_same(tmp_path, simulate(tmp_path, num_rounds=2, **EXACT), 2)


@pytest.mark.parametrize(
    "numbers",
    [
        (),
        (0,),
        (3, 0),
        (0, 10),
        (0, 10, 0),
        (1, 900, 0, 3),
        (0, 900, 0, 10**9),
        (0, 900, 1, 2, 1, 2),
    ],
)  # fmt: skip
def test_numbers_that_tell_no_terms_are_refused(tmp_path, numbers):
    """And those that claim more than came cost nothing."""
    local = FederatedTrainer(
        task.wide_model_fn(), task.arguments(tmp_path, **EXACT), task.clients()
    )._local
    exact = ExactAverage(local.model, local.first_server())
    with pytest.raises(PayloadError, match="malformed"):
        exact.told(numbers, 2)


def without_norm():
    """No buffers, which noise would not protect."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


CLIP = {"clip_update_norm": 0.05, "clip_target_quantile": 0.5, "clip_learning_rate": 1.0}


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (None, {}),
        (Scaffold(), {**INT8, "clients_per_round": 2}),
        (None, {"dp_noise_multiplier": 0.4, "dp_noise_seed": 7, "clip_count_std": 0.3}),
    ],
)
def test_a_clipping_norm_that_follows_the_updates_is_the_simulations(
    tmp_path, strategy, more, monkeypatch
):
    """The server finds out by itself who was clipped; what nodes are told is the norm."""
    monkeypatch.setattr(task, "model_fn", without_norm)
    grid = run(tmp_path, strategy, save_every=1, **CLIP, **more)
    trainer = simulate(tmp_path, strategy, **CLIP, **more)
    assert_same(tmp_path, trainer)
    norms = [report.clip_norm for report in history(tmp_path)]
    assert len(set(norms)) == 4
    told = {
        m.content["job"]["round"]: m.content["job"]["clip_norm"]
        for m in grid.wire if "job" in m.content
    }  # fmt: skip
    assert [told[number] for number in sorted(told)] == norms
