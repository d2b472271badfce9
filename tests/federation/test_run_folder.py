"""What a run leaves in its folder, and what it does not overwrite."""

import errno
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import mlp
from torch import nn

from fedpara_peft import (
    FederatedCallback,
    FederatedTrainer,
    History,
    ResumeError,
    RunFolderError,
    Scaffold,
    partition,
)
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.federation.folder import checkpoint
from fedpara_peft.federation.folder.checkpoint import checkpoints
from fedpara_peft.federation.folder.store import file_key


class Interrupt(FederatedCallback):
    def __init__(self, round):
        self.round = round

    def on_round_end(self, server, report):
        if report.round == self.round:
            raise KeyboardInterrupt


def trainer(folder, callbacks=(), clients=None, model=None, strategy=None, **settings):
    settings = {"num_rounds": 5, "clients_per_round": 2, **settings}
    model = model or mlp(norm=False)
    clients = clients or partition(toy(), "iid", 4)
    return FederatedTrainer(
        model, arguments(folder, **settings), clients, callbacks=list(callbacks), strategy=strategy
    )


def interrupted(folder, round=3, **settings):
    run = trainer(folder, [Interrupt(round)], **settings)
    with pytest.raises(KeyboardInterrupt) as found:
        run.train()
    return run, found.value.__notes__[-1]


def test_an_interrupted_run_keeps_its_history_and_says_how_to_go_on(tmp_path):
    run, note = interrupted(tmp_path)
    whole = trainer(tmp_path / "whole", num_rounds=3)
    expected = whole.train()
    assert len(run.history) == 3
    assert History.load(tmp_path / "history.json").rounds == run.history.rounds
    assert [r.train_loss for r in run.history] == [r.train_loss for r in expected]
    transfers = list(Ledger.load(tmp_path / "ledger.npy").transfers())
    assert transfers == list(whole.ledger.transfers())
    for ours, theirs in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "after round 3 of 5" in note
    assert "no checkpoint to continue from (save_every" in note


def test_with_checkpoints_the_way_to_resume_is_named(tmp_path):
    _, note = interrupted(tmp_path, save_every=2)
    assert f"continue from checkpoint-2 in {tmp_path}" in note
    assert "resume_from_checkpoint=True" in note


def test_the_history_is_current_at_any_time(tmp_path):
    seen = []

    class Looks(FederatedCallback):
        def on_round_end(self, server, report):
            seen.append((len(run.history), run.ledger.total_bytes(report.round, "uplink")))

    run = trainer(tmp_path, [Looks()])
    run.train()
    assert [n for n, _ in seen] == [1, 2, 3, 4, 5]
    assert all(sent == run.history[0].uplink_bytes for _, sent in seen)


def test_two_runs_do_not_share_a_folder(tmp_path):
    found = []

    class AnotherComes(FederatedCallback):
        def on_round_end(self, server, report):
            with pytest.raises(RunFolderError, match=f"another run trains into {tmp_path}"):
                trainer(tmp_path, overwrite_output_dir=True).train()
            found.append(report.round)

    history = trainer(tmp_path, [AnotherComes()], save_every=1).train()
    assert found == [1, 2, 3, 4, 5] == [*checkpoints(tmp_path)]
    assert history.rounds == History.load(tmp_path / "history.json").rounds
    trainer(tmp_path, overwrite_output_dir=True).train()  # it ended: the folder is free


def test_another_run_is_not_overwritten(tmp_path):
    trainer(tmp_path).train()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    for changes, named in (
        ({"learning_rate": 0.2}, "learning_rate: 0.1 then, 0.2 now"),
        ({"strategy": Scaffold()}, "strategy"),
        ({"model": nn.Sequential(nn.Linear(8, 4))}, "model"),
        ({"clients": partition(toy(seed=3), "iid", 4)}, "clients' data"),
        ({"clients": partition(toy(), "iid", 5)}, "number of clients: 4 then, 5 now"),
    ):
        with pytest.raises(ResumeError, match=named) as found:
            trainer(tmp_path, **changes).train()
        assert "overwrite_output_dir=True" in str(found.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    trainer(tmp_path, report_to="none", eval_batch_size=7).train()  # the same run once more


def test_overwriting_leaves_nothing_of_the_other_run(tmp_path):
    first = trainer(tmp_path, save_every=1, strategy=Scaffold(), client_store="disk")
    first.train()
    first.save_model()
    trainer(tmp_path, num_rounds=2, overwrite_output_dir=True).train()
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {".lock", "history.json", "ledger.npy", "settings.json"}
    assert len(History.load(tmp_path / "history.json")) == 2


def test_a_flipped_byte_in_a_checkpoint_is_noticed(tmp_path):
    trainer(tmp_path, save_every=2, num_rounds=4).train()
    newest = tmp_path / "checkpoint-4"
    names = [path.name for path in newest.iterdir()]
    assert {"server.safetensors", "trainer_state.json", "ledger.npy"} < set(names)
    for name in names:
        path = newest / name
        whole = path.read_bytes()
        for damaged in (
            whole[:-1] + bytes([whole[-1] ^ 1]),
            whole[: len(whole) // 2],
            b"",
            whole[:40] + b"\xff" + whole[41:],
        ):
            path.write_bytes(damaged)
            with pytest.raises(ResumeError, match=r"checkpoint-4 is damaged.*checkpoint-2'\)"):
                trainer(tmp_path).train(resume_from_checkpoint=True)
        path.write_bytes(whole)
    (tmp_path / "checkpoint-4" / "server.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"server.safetensors is missing"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    history = trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert len(history) == 5


def test_a_flipped_byte_in_a_clients_state_is_noticed(tmp_path):
    trainer(tmp_path, save_every=2, num_rounds=4, local_modules=["2"]).train()
    for path in (tmp_path / "clients").iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ResumeError, match=r"clients/client-\d\.round-\d\.safetensors is not what"):
        trainer(tmp_path, local_modules=["2"]).train(resume_from_checkpoint=True)


def named(names):
    return dict(zip(names, partition(toy(), "iid", len(names)), strict=True))


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_nobody_gets_anothers_half(tmp_path, store):
    names = ["ann", "Bob", "bob", "a/b", "a_b", 3, "3", ("x", 1)]
    settings = {
        "local_modules": ["2"], "save_every": 2, "num_rounds": 2, "client_store": store,
        "clients_per_round": 8,
    }  # fmt: skip
    first = trainer(tmp_path, clients=named(names), **settings)
    first.train()
    assert len(list((tmp_path / "clients").iterdir())) == len(names)
    again = trainer(tmp_path, clients=named(names), **settings)
    again.train(resume_from_checkpoint=True)
    for name in names:
        ours, theirs = (run.client_model(name)[2].weight for run in (again, first))
        assert torch.equal(ours, theirs)
        others = [n for n in names if n != name]
        assert not any(torch.equal(first.client_model(o)[2].weight, ours) for o in others)
    for other in (names[::-1], [*names[:-1], "someone else"]):
        run = trainer(tmp_path, clients=named(other), **settings)
        with pytest.raises(ResumeError, match=r"clients' names: .'ann'"):
            run.train(resume_from_checkpoint=True)
    split = dict(zip(names, partition(toy(), "iid", 8, seed=5), strict=True))
    with pytest.raises(ResumeError, match="clients' data"):
        trainer(tmp_path, clients=split, **settings).train(resume_from_checkpoint=True)


def test_no_two_names_have_one_file():
    names = [
        "a",
        "A",
        "a b",
        "a_b",
        "a/b",
        "a.b",
        "Ä",
        "ä",
        1,
        "1",
        True,
        (1,),
        "a" * 300,
        "a" * 301,
        "",
    ]
    keys = [file_key(name) for name in names]
    assert len({key.lower() for key in keys}) == len(names)
    assert all(len(key) < 80 and "/" not in key for key in keys)


@pytest.mark.parametrize("limit", [1, 2, None])
def test_a_full_disk_names_the_folder_and_the_way_to_go_on(tmp_path, monkeypatch, limit):
    normal = checkpoint.save_file

    def full(tensors, path, *args):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        normal(tensors, path, *args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = trainer(tmp_path, save_every=1, save_total_limit=limit)
    with pytest.raises(RunFolderError, match=r"checkpoint-4 could not be written \(No space") as e:
        run.train()
    assert "resumes from" in str(e.value)
    assert str(tmp_path / "checkpoint-3") in str(e.value)
    assert max(checkpoints(tmp_path)) == 3
    assert not list(tmp_path.glob(".checkpoint*"))
    assert len(History.load(tmp_path / "history.json")) == 4
    monkeypatch.undo()
    resumed = trainer(tmp_path, save_every=1, save_total_limit=limit)
    assert len(resumed.train(resume_from_checkpoint=True)) == 5


def test_room_is_made_before_a_checkpoint_is_written_where_one_stays(tmp_path, monkeypatch):
    most = {1: 0, 2: 0, 3: 0}
    normal = checkpoint.os.replace

    for limit in most:

        def counted(one, other, limit=limit):
            whole = list(checkpoints(tmp_path / str(limit)))
            if Path(other).name.startswith("checkpoint-"):
                most[limit] = max(most[limit], len(whole))
            normal(one, other)

        monkeypatch.setattr(checkpoint.os, "replace", counted)
        run = trainer(tmp_path / str(limit), save_every=1, save_total_limit=limit)
        run.train()
        monkeypatch.undo()
        assert list(checkpoints(tmp_path / str(limit))) == list(range(6 - limit, 6))
    assert most == {1: 1, 2: 1, 3: 2}  # whole ones while the next is about to get its name


def test_metrics_that_are_no_numbers_are_valid_json(tmp_path):
    def metrics(prediction):
        return {"a": float("nan"), "b": float("inf")}

    run = FederatedTrainer(
        mlp(norm=False), arguments(tmp_path, num_rounds=1), partition(toy(), "iid", 4), toy(),
        compute_metrics=metrics,
    )  # fmt: skip
    run.train()
    text = (tmp_path / "history.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = History.load(tmp_path / "history.json")[0].metrics
    assert found["eval_a"] != found["eval_a"]
    assert found["eval_b"] == float("inf")


def test_a_refusal_does_not_break_the_bar(tmp_path, capsys):
    class Sometimes(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            if i == 8:
                raise OSError("row 8 is gone")
            return toy()[i]

    clients = {"ann": toy(), "bob": Sometimes()}
    run = trainer(tmp_path, clients=clients, disable_tqdm=False, num_rounds=2)
    logging.getLogger().handlers, kept = [], logging.getLogger().handlers
    try:
        history = run.train()
    finally:
        logging.getLogger().handlers = kept
    assert history[0].refused == (("bob", "failed"),)
    shown = capsys.readouterr().err
    lines = [line.split("\r")[-1] for line in shown.split("\n") if "row 8 is gone" in line]
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Z]", "", line) for line in lines]  # moves between the bars
    told = "round {}, client 'bob': it failed: OSError: row 8 is gone"
    assert lines == [told.format(1), told.format(2)]
