"""A run that was interrupted ends in the same bits, whatever interrupted it and when."""

import json
import math
import random
import shutil
import time

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.federation.runs import STRATEGIES, run
from tests.federation.test_trainer import arguments, toy
from tests.forks import FORKS, finish, kill, started
from tests.layer_kinds import in_turn
from tests.zoo import adapted, mlp

from fedpara_peft import (
    ClientDataError,
    FedAvg,
    FederatedCallback,
    FederatedTrainer,
    PayloadError,
    ResumeError,
    RoundError,
    Scaffold,
    partition,
)
from fedpara_peft.comm.state import local_state
from fedpara_peft.federation.folder.checkpoint import checkpoints
from fedpara_peft.federation.folder.history import report_from_json, report_to_json
from fedpara_peft.federation.state import RoundReport


class InterruptedTestError(Exception):
    pass


class StopAfter(FederatedCallback):
    def __init__(self, round):
        self.round = round

    def on_round_end(self, server, report):
        if report.round == self.round:
            raise InterruptedTestError


def trainer(folder, strategy=None, parameterization="pfedpara", callbacks=(), **changes):
    settings = {"num_rounds": 7, "save_every": 2, "drop_out_probability": 0.2, **changes}
    model = adapted(mlp(norm=False), parameterization=parameterization)
    clients = partition(toy(), "iid", 5)
    return FederatedTrainer(
        model, arguments(folder, **settings), clients, toy(), strategy=strategy,
        callbacks=list(callbacks),
    )  # fmt: skip


def final(run):
    """Everything that a run leaves behind: the global model, all clients, the counted bytes."""
    state = {f"global {k}": v for k, v in run.model.state_dict().items()}
    for i in range(5):
        state |= {f"{i} {k}": v for k, v in run.client_model(i).state_dict().items()}
        kept = run.client_state(i)
        for group, tensors in (kept.strategy if kept else {}).items():
            state |= {f"{i} {group} {k}": v for k, v in tensors.items()}
        for part, tensors in (kept.optimizer if kept else {}).items():
            state |= {f"{i} optimizer {part} {k}": v for k, v in tensors.items()}
    return state, [(t.round, t.client, t.direction, t.total_bytes) for t in run.ledger.transfers()]


def same(a, b):
    return (
        a[0].keys() == b[0].keys()
        and all(torch.equal(x, b[0][k]) for k, x in a[0].items())
        and a[1] == b[1]
    )


@pytest.mark.parametrize(
    ("strategy", "stop", "store"), in_turn(STRATEGIES, [3, 4], by=["memory", "disk"])
)
def test_resumed_is_uninterrupted(tmp_path, strategy, stop, store):
    strategy = STRATEGIES[strategy]
    whole = trainer(tmp_path / "whole", strategy)
    history = whole.train()
    with pytest.raises(InterruptedTestError):
        trainer(tmp_path / "cut", strategy, callbacks=[StopAfter(stop)], client_store=store).train()
    again = trainer(tmp_path / "cut", strategy, client_store=store)
    resumed = again.train(resume_from_checkpoint=True)
    assert same(final(again), final(whole))
    assert [r.train_loss for r in resumed] == [r.train_loss for r in history]
    assert [r.metrics for r in resumed] == [r.metrics for r in history]


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_new_clients_of_a_resumed_run_begin_as_they_would_have(tmp_path, engine):
    """A script without a seed builds other local tensors at every start."""
    settings = {"clients_per_round": 1, "num_rounds": 12, "drop_out_probability": 0.0}
    settings["engine"] = engine
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(InterruptedTestError):
        trainer(tmp_path / "cut", callbacks=[StopAfter(2)], **settings).train()
    model = adapted(mlp(norm=False), parameterization="pfedpara")
    for tensor in local_state(model).values():
        tensor.normal_()
    clients = partition(toy(), "iid", 5)
    again = FederatedTrainer(
        model, arguments(tmp_path / "cut", save_every=2, **settings), clients, toy()
    )
    again.train(resume_from_checkpoint=True)
    assert same(final(again), final(whole))


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_resumed_is_uninterrupted_with_the_optimizers_state(tmp_path, optim, store):
    settings = {
        "optim": optim, "optimizer_state": "keep", "learning_rate": 0.01, "num_rounds": 6,
        "momentum": 0.9 * (optim == "sgd"), "factor_learning_rate": 0.02,
        "lr_scheduler_type": "cosine", "warmup_rounds": 1, "client_store": store,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(InterruptedTestError):
        trainer(tmp_path / "cut", callbacks=[StopAfter(3)], **settings).train()
    again = trainer(tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint=True)
    state, _ = final(again)
    assert any(" optimizer " in name for name in state)
    assert same(final(again), final(whole))


def test_clients_that_trained_after_the_checkpoint_are_rolled_back(tmp_path):
    with pytest.raises(InterruptedTestError):
        trainer(tmp_path, Scaffold(), callbacks=[StopAfter(5)], client_store="disk").train()
    after = {p.name for p in (tmp_path / "clients").iterdir()}
    assert any("round-5" in name for name in after)
    again = trainer(tmp_path, Scaffold(), num_rounds=4, client_store="disk")
    again.train(resume_from_checkpoint=True)  # nothing left to do but to take back
    assert {p.name for p in (tmp_path / "clients").iterdir()} == {
        name for name in after if "round-5" not in name
    }
    whole = trainer(tmp_path / "whole", Scaffold(), num_rounds=4)
    whole.train()
    assert same(final(again), final(whole))


def test_more_rounds_an_older_checkpoint_and_limits(tmp_path):
    trainer(tmp_path, num_rounds=4, save_every=1, save_total_limit=3).train()
    assert list(checkpoints(tmp_path)) == [2, 3, 4]
    longer = trainer(tmp_path, num_rounds=7, save_every=0)
    longer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert same(final(longer), final(whole))
    assert list(checkpoints(tmp_path)) == [2, 3]  # 4 spoke of clients that were rolled back


def test_the_slowest_client_is_the_one_that_trained_longest(tmp_path):
    run = trainer(tmp_path, clients_per_round=5, drop_out_probability=0.0, num_rounds=2)
    train = run._local.train

    def turn(client, dataset, round, *args):
        time.sleep(0.01 * client)
        if (client, round) == (4, 1):
            time.sleep(0.2)
            raise PayloadError("diverged", "it sends nothing, so nobody waits for it")
        return train(client, dataset, round, *args)

    run._local.train = turn
    first, second = run.train()
    assert first.slowest_client_s >= 0.04
    assert 0.03 <= second.slowest_client_s < second.seconds - 0.2


def test_without_a_checkpoint_it_starts_afresh_and_says_so(tmp_path, caplog):
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert "no checkpoint" in caplog.text
    assert list(checkpoints(tmp_path)) == [2, 4, 6, 7]


def test_what_cannot_be_resumed_is_refused_and_nothing_is_lost(tmp_path):
    trainer(tmp_path, Scaffold()).train()
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(ResumeError, match="checkpoint-7 of an earlier run"):
        trainer(tmp_path, Scaffold()).train()
    with pytest.raises(ResumeError, match=r"learning_rate: 0.1 then, 0.2 now"):
        trainer(tmp_path, Scaffold(), learning_rate=0.2).train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match=r"strategy: \['Scaffold'.* then, \['FedAvg'"):
        trainer(tmp_path, FedAvg()).train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match="model: "):
        trainer(tmp_path, Scaffold(), "lowrank").train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match=r"not a checkpoint \(trainer_state.json is missing"):
        trainer(tmp_path, Scaffold()).train(resume_from_checkpoint=tmp_path / "clients")
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_checkpoint_without_its_clients_is_not_resumed(tmp_path):
    whole = trainer(tmp_path / "a", Scaffold())
    whole.train()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ResumeError, match=r"checkpoint-4 is not in output_dir=.*b, and what its"):
        trainer(tmp_path / "b", Scaffold()).train(tmp_path / "a" / "checkpoint-4")
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "b", tmp_path / "b" / ".lock"}
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "c" / "checkpoint-4")
    with pytest.raises(ResumeError, match=r"is damaged \(clients/client-\d\.round-\d.* is missing"):
        trainer(tmp_path / "c", Scaffold()).train(resume_from_checkpoint=True)
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    moved = trainer(tmp_path / "d", Scaffold())
    moved.train(resume_from_checkpoint=tmp_path / "d" / "checkpoint-4")
    assert same(final(moved), final(whole))


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_a_clients_damaged_state_stops_the_run(tmp_path, engine):
    trainer(tmp_path, Scaffold(), engine=engine).train()
    for path in (tmp_path / "clients").glob("*.round-*"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    again = trainer(tmp_path, Scaffold(), engine=engine, num_rounds=9)
    with pytest.raises(ResumeError, match=r"client-\d.* is not what was written \(its digest"):
        again.train(resume_from_checkpoint=True)
    assert len(again.history) == 7


def test_a_run_is_resumed_on_its_own_frozen_base_alone(tmp_path):
    def resumed(seed, rounds):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        torch.manual_seed(0)
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        args = arguments(tmp_path, num_rounds=rounds, save_every=1)
        run = FederatedTrainer(model, args, partition(toy(), "iid", 5))
        return run.train(resume_from_checkpoint=True)

    resumed(0, 2)
    with pytest.raises(ResumeError, match=r"frozen base: '.*' then, '.*' now"):
        resumed(1, 3)
    assert len(resumed(0, 3)) == 3


NAMES = {
    "integers of NumPy": (np.int64, int),
    "texts of NumPy": (np.str_, str),
    "tuples": (lambda i: ("a", (i, None)), lambda i: ("a", (i, None))),
    "numbers": (lambda i: i / 4, lambda i: i / 4),
}


@pytest.mark.parametrize("kind", NAMES)
def test_clients_names_come_back_as_they_were(tmp_path, kind):
    given, kept = NAMES[kind]

    def resumed(rounds):
        clients = {given(i): part for i, part in enumerate(partition(toy(), "iid", 5))}
        args = arguments(tmp_path, num_rounds=rounds, save_every=1, eval_every=1)
        run = FederatedTrainer(adapted(mlp(norm=False)), args, clients, client_eval_dataset=clients)
        return run.train(resume_from_checkpoint=True)

    resumed(2)
    history = resumed(4)
    names = [kept(i) for i in range(5)]
    assert len(history) == 4
    for report in history:
        assert set(report.cohort) <= set(names)
        assert list(report.client_metrics["loss"]) == names
        assert {type(name) for name in report.client_metrics["loss"]} == {type(names[0])}


@pytest.mark.parametrize("name", [frozenset("a"), ("a", object), b"a"])
def test_a_name_that_would_not_come_back_is_refused(tmp_path, name):
    with pytest.raises(ClientDataError, match="let names be texts, numbers or tuples"):
        FederatedTrainer(adapted(mlp(norm=False)), arguments(tmp_path), {name: toy()})


def test_numbers_of_a_report_that_json_has_not():
    report = RoundReport(
        1, (0,), math.nan, {"eval_loss": math.inf}, 1, 1, 0, 1.0, averaging_bias=math.nan,
        epsilon=math.inf, clip_norm=-math.inf, client_metrics={"loss": {0: math.nan}},
    )  # fmt: skip
    again = report_from_json(json.loads(json.dumps(report_to_json(report), allow_nan=False)))
    assert repr(again) == repr(report)


def test_a_failed_round_takes_its_clients_back(tmp_path):
    run = trainer(
        tmp_path, Scaffold(), drop_out_probability=0.0, clients_per_round=5,
        on_client_error="raise",
    )  # fmt: skip
    normal = run._local.train

    def fails_late(client, dataset, round, *args):
        if (round, client) == (3, 4):
            raise RoundError("client 4 diverged in round 4")
        return normal(client, dataset, round, *args)

    run._local.train = fails_late
    with pytest.raises(RoundError):
        run.train()
    three = trainer(
        tmp_path / "three", Scaffold(), drop_out_probability=0.0, clients_per_round=5, num_rounds=3
    )
    three.train()
    assert same(({**final(run)[0]}, []), ({**final(three)[0]}, []))


@pytest.mark.programs
@pytest.mark.parametrize(
    "case",
    [
        ("Scaffold", "pfedpara"),
        ("FedAdam", "fedpara", "seeded"),
        ("FedAvg", "pfedpara", "keep"),
        ("FedDyn", "pfedpara", "secure"),
        ("FedAvgM", "pfedpara", "late"),
    ],
)
def test_killed_and_resumed(tmp_path, case):
    """A real process that dies of SIGKILL; ``tests/slow`` does it more often."""
    rng = random.Random(str(case))

    variant = case[2] if len(case) > 2 else None

    def start(folder, tell=print):
        return started(run, folder, *case[:2], 20, variant, tell)

    finish(start(tmp_path / "whole"))
    expected = load_file(tmp_path / "whole" / "final.safetensors")
    for _ in range(2):
        rounds, tells = FORKS.Pipe(duplex=False)
        process = start(tmp_path / "cut", tells.send)
        for _ in range(rng.randint(1, 4)):
            rounds.recv()
        assert kill(process)  # within the next round, or soon after
    finish(start(tmp_path / "cut"))
    found = load_file(tmp_path / "cut" / "final.safetensors")
    assert found.keys() == expected.keys()
    assert any(k.startswith("optimizer") for k in found) == ("keep" in case)
    assert all(torch.equal(t, expected[k]) for k, t in found.items())
