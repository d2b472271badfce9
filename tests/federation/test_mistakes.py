"""What users get wrong, told in one line, and what they may write in two ways."""

import sys

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import mlp
from torch.utils.data import Dataset

from fedpara_peft import (
    ArgumentsError,
    FedAdam,
    FedAvg,
    FederatedArguments,
    FederatedTrainer,
    RoundError,
    Scaffold,
    partition,
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_rounds": 2.5}, "num_rounds must be of type int, got 2.5 (float)"),
        ({"num_rounds": "10"}, "num_rounds must be of type int, got '10' (str)"),
        ({"num_rounds": True}, "num_rounds must be of type int, got True (bool)"),
        ({"learning_rate": "0.1"}, "learning_rate must be of type float, got '0.1' (str)"),
        ({"learning_rate": float("nan")}, "learning_rate must be in (0, ∞), got nan"),
        ({"clients_per_round": 2.0}, "clients_per_round must be of type int or None, got 2.0"),
        ({"seed": "a"}, "seed must be of type int, got 'a'"),
        ({"seed": None}, "seed must be of type int, got None"),
        ({"momentum": 5.0}, "momentum must be in [0, 1), got 5.0"),
        ({"weight_decay": -1}, "weight_decay must be in [0, ∞), got -1.0"),
        ({"disable_tqdm": 1}, "disable_tqdm must be of type bool, got 1"),
        ({"report_to": 3}, "report_to must be a list of str or None, got 3"),
        ({"on_client_error": "ignore"}, "on_client_error must be one of ['refuse', 'raise']"),
    ],
)
def test_an_argument_of_another_type_or_range(changes, says):
    with pytest.raises(ArgumentsError) as found:
        FederatedArguments("x", **changes)
    assert says in str(found.value)
    assert "\n" not in str(found.value)


def test_what_is_plainly_meant_is_taken(tmp_path):
    import numpy as np

    args = FederatedArguments(
        tmp_path, num_rounds=np.int64(3), learning_rate=1, momentum=np.float32(0.5),
        local_modules=("a", "b"), report_to="none",
    )  # fmt: skip
    assert (args.output_dir, args.num_rounds, args.learning_rate) == (str(tmp_path), 3, 1.0)
    assert [type(v) for v in (args.num_rounds, args.learning_rate, args.momentum)] == [
        int, float, float,
    ]  # fmt: skip
    assert (args.local_modules, args.report_to) == (["a", "b"], ["none"])


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("fedavg", FedAvg),
        ("FedAdam", FedAdam),
        ("scaffold", Scaffold),
        (Scaffold, Scaffold),
        (None, FedAvg),
    ],
)
def test_a_strategy_by_name_or_class(tmp_path, given, kind):
    clients = partition(toy(), "iid", 3)
    args = arguments(tmp_path, clients_per_round=2)
    assert type(FederatedTrainer(mlp(), args, clients, strategy=given).strategy) is kind


@pytest.mark.parametrize("given", ["fedsgd", 3, dict])
def test_no_strategy(tmp_path, given):
    with pytest.raises(ArgumentsError, match=r"strategy is .*one of the names FedAvg, FedAvgM"):
        FederatedTrainer(mlp(), arguments(tmp_path), partition(toy(), "iid", 3), strategy=given)


def test_arguments_as_a_dictionary():
    with pytest.raises(
        ArgumentsError, match=r"args is a dict: give FederatedArguments\(\*\*args\)"
    ):
        FederatedTrainer(mlp(), {"output_dir": "x"}, partition(toy(), "iid", 3))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wandb", "report_to='wandb' is not installed: pip install wandb"),
        ("tensorbord", "report_to='tensorbord' is no tracker: there are "),
    ],
)
def test_a_tracker_that_is_not_there(tmp_path, name, says):
    if name in sys.modules:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ArgumentsError) as found:
        FederatedTrainer(mlp(), arguments(tmp_path, report_to=name), partition(toy(), "iid", 3))
    assert says in str(found.value)


def test_a_refused_start_leaves_no_events_and_a_run_tells_all(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(**changes):
        return FederatedTrainer(
            mlp(norm=False),
            arguments(tmp_path, report_to=["none", "tensorboard"], num_rounds=2, **changes),
            partition(toy(), "iid", 4), toy(),
        )  # fmt: skip

    run(clip_update_norm=1.0, dp_noise_multiplier=0.5).train()
    folder = tmp_path / "federated"
    before = sorted(folder.rglob("*"))
    with pytest.raises(RuntimeError, match="another run"):
        run().train()
    assert sorted(folder.rglob("*")) == before
    events = EventAccumulator(str(folder)).Reload()
    told = set(events.Tags()["scalars"])
    assert {
        "train_loss", "eval_loss", "uplink_bytes", "downlink_bytes", "refused", "dropped",
        "seconds", "epsilon",
    } <= told  # fmt: skip
    assert len(events.Scalars("epsilon")) == 2


class Unreadable(Dataset):
    def __init__(self, data, round):
        self.data, self.epoch, self.last = data, 0, round

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if self.last:
            raise OSError("images/7.jpg is damaged")
        return self.data[i]


def test_a_client_that_cannot_read_a_file_is_refused_by_name(tmp_path):
    data = dict(zip(["ann", "bob", "cid"], partition(toy(), "iid", 3), strict=True))
    spoilt = {**data, "bob": Unreadable(data["bob"], True)}
    settings = {"clients_per_round": 3, "num_rounds": 2}
    run = FederatedTrainer(mlp(norm=False), arguments(tmp_path / "a", **settings), spoilt)
    history = run.train()
    assert [r.refused for r in history] == [(("bob", "failed"),)] * 2
    # As if it had not been there.
    torch.testing.assert_close(history[0].uplink_bytes * 3, history[0].downlink_bytes * 2)
    with pytest.raises(RoundError, match="quorum"):
        FederatedTrainer(
            mlp(norm=False), arguments(tmp_path / "b", quorum=0.9, **settings), spoilt
        ).train()


def test_a_clients_exception_says_who_and_when(tmp_path):
    data = dict(zip(["ann", "bob"], partition(toy(), "iid", 2), strict=True))
    spoilt = {**data, "bob": Unreadable(data["bob"], True)}
    settings = {"clients_per_round": 2, "num_rounds": 2}
    run = FederatedTrainer(
        mlp(norm=False), arguments(tmp_path / "a", on_client_error="raise", **settings), spoilt
    )
    with pytest.raises(OSError, match=r"images/7.jpg") as found:
        run.train()
    assert "in round 1, client 'bob'" in found.value.__notes__
    assert "stopped after round 0 of 2" in found.value.__notes__[-1]


def test_a_fault_of_everybody_is_raised_as_it_is(tmp_path):
    """A mistake in the script's own loss is not told as clients that were refused."""

    def loss(model, batch):
        return model(batch[0]).no_such_method()

    run = FederatedTrainer(
        mlp(norm=False), arguments(tmp_path), partition(toy(), "iid", 3), compute_loss=loss
    )
    with pytest.raises(AttributeError, match="no_such_method"):
        run.train()


def test_small_amounts_are_shown(tmp_path, capsys):
    args = arguments(tmp_path, num_rounds=1, disable_tqdm=False)
    FederatedTrainer(torch.nn.Linear(16, 4), args, partition(toy(), "iid", 3)).train()
    assert "sent=0.00" not in (shown := capsys.readouterr().err)
    assert "kB" in shown
