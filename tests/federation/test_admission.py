"""What is refused, by whose name, when a round goes on, and what a client may keep."""

import dataclasses

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp
from torch import nn

from fedpara_peft import (
    FedAdam,
    FedDyn,
    FederatedCallback,
    FederatedTrainer,
    History,
    LocalOnly,
    RoundError,
    Scaffold,
    Strategy,
    partition,
)
from fedpara_peft.federation.server.admission import usable_state
from fedpara_peft.federation.state import ClientState

WARDS = ("ward a", "ward b", "ward c")


class Last(FederatedCallback):
    def on_round_end(self, server, report):
        self.server = server


def named(names=WARDS):
    return dict(zip(names, partition(toy(), "iid", len(names)), strict=True))


def spoilt(run, clients, rounds=(), factor=float("nan")):
    """Some clients send something else than they trained, in some rounds or in all."""
    train = run._local.train

    def turn(client, data, number, *args):
        trained = train(client, data, number, *args)
        if client not in clients or (rounds and number not in rounds):
            return trained
        tensors = {n: t * factor for n, t in trained.update.update.items()}
        update = dataclasses.replace(trained.update, update=tensors)
        return dataclasses.replace(trained, update=update)

    run._local.train = turn
    return run


def trained_state(run):
    return {n: t.clone() for n, t in run.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(t, b[n]) for n, t in a.items())


# Whose it is.


@pytest.mark.parametrize("names", [WARDS, (7, 11, 3)])
def test_refusals_have_the_names_that_the_user_gave(tmp_path, names, caplog):
    run = FederatedTrainer(mlp(), arguments(tmp_path, num_rounds=2), named(names))
    history = spoilt(run, {1}).train()
    assert [r.refused for r in history] == [((names[1], "not_finite"),)] * 2
    assert f"round 2, client {names[1]!r}: payload refused (not_finite)" in caplog.text
    assert History.load(tmp_path / "history.json") == history
    strict = FederatedTrainer(mlp(), arguments(tmp_path / "strict", quorum=1.0), named(names))
    with pytest.raises(RoundError, match=rf"2 of 3 .*client {names[1]!r}: payload refused"):
        spoilt(strict, {1}).train()


# Whether a round goes on.


@pytest.mark.parametrize("schedule", ["all", "one_block"])
@pytest.mark.parametrize(
    ("aggregation", "strategy"),
    [
        *(("mean", strategy) for strategy in (None, Scaffold(), FedDyn(), FedAdam())),
        *((robust, s) for robust in ("median", "trimmed_mean:0.2") for s in (None, FedAdam())),
    ],
)
def test_one_refused_client_of_one_ends_no_run(tmp_path, aggregation, schedule, strategy, caplog):
    run = FederatedTrainer(
        adapted(mlp()),
        arguments(
            tmp_path, num_rounds=3, clients_per_round=1, aggregation=aggregation,
            factor_schedule=schedule, quorum=0,
        ),
        [toy()],
        strategy=strategy,
    )  # fmt: skip
    before = trained_state(run)
    states = []
    run.callbacks.append(
        type("Keep", (FederatedCallback,), {
            "on_round_end": lambda s, server, report: states.append(trained_state(run))
        })()
    )  # fmt: skip
    history = spoilt(run, {0}, rounds={0, 1}).train()
    assert [r.refused for r in history] == [((0, "not_finite"),), ((0, "not_finite"),), ()]
    assert [r.train_loss is None for r in history] == [True, True, False]
    assert same(states[0], before)
    assert same(states[1], before)
    assert not same(states[2], before)
    assert caplog.text.count("no update of the round can be used") == 2


def test_a_run_in_which_everybody_diverges_stops_by_default(tmp_path):
    run = FederatedTrainer(mlp(), arguments(tmp_path), named())
    before = trained_state(run)
    with pytest.raises(RoundError, match=r"all 3 updates .*refused \(client 'ward a'.*quorum=0"):
        spoilt(run, {0, 1, 2}).train()
    assert same(trained_state(run), before)


def test_a_round_that_all_dropped_out_of_changes_nothing(tmp_path):
    run = FederatedTrainer(
        mlp(), arguments(tmp_path, num_rounds=1, drop_out_probability=0.999), named()
    )
    before = trained_state(run)
    (report,) = run.train()
    assert len(report.dropped) == 3
    assert same(trained_state(run), before)


def test_a_quorum_asks_for_updates(tmp_path):
    for quorum, refused in ((0.3, {0, 1, 2}), (1.0, {2}), (0.67, {0, 1})):
        folder = tmp_path / f"{quorum}"
        run = FederatedTrainer(mlp(), arguments(folder, quorum=quorum), named())
        with pytest.raises(RoundError, match=rf"{3 - len(refused)} of 3 sampled"):
            spoilt(run, refused).train()
    run = FederatedTrainer(mlp(), arguments(tmp_path / "enough", quorum=0.66), named())
    assert len(spoilt(run, {1}).train()) == 3


def test_with_noise_a_round_of_refusals_moves_by_the_noise_alone(tmp_path):
    pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")

    def moved(name, refused):
        run = FederatedTrainer(
            mlp(norm=False),
            arguments(
                tmp_path / name, num_rounds=1, clip_update_norm=0.5, dp_noise_multiplier=1.0,
                dp_noise_seed=3, learning_rate=1e-9,
            ),
            named(),
        )  # fmt: skip
        before = trained_state(run)
        spoilt(run, refused).train()
        return torch.cat([(t - before[n]).flatten() for n, t in run.model.state_dict().items()])

    noise = moved("none", set())
    assert noise.std() == pytest.approx(0.5 / 3, rel=0.1)
    torch.testing.assert_close(moved("all", {0, 1, 2}), noise, atol=1e-6, rtol=0)


# What a client keeps.


@pytest.mark.parametrize("strategy", [Scaffold(), FedDyn()])
def test_what_the_server_refuses_changes_nothing_of_what_a_client_keeps(tmp_path, strategy):
    """c (h) is the mean of what the clients keep, whichever updates are refused."""
    last = Last()
    run = FederatedTrainer(
        mlp(norm=False).double(),
        arguments(
            tmp_path, num_rounds=6, clients_per_round=5, drop_out_probability=0.2,
            max_update_norm=20.0, learning_rate=0.02,
        ),
        [
            torch.utils.data.TensorDataset(x.tensors[0].double(), x.tensors[1])
            for x in (toy(20 + 20 * (i % 3 == 0), i) for i in range(6))
        ],
        strategy=strategy,
        callbacks=[last],
    )  # fmt: skip
    history = spoilt(run, {1, 2, 4}, rounds={1, 2, 4}, factor=1e5).train()
    refused = [(c, reason) for r in history for c, reason in r.refused]
    assert {reason for _, reason in refused} == {"norm"}
    assert len(refused) > 4
    group, total = ("control", "control") if isinstance(strategy, Scaffold) else ("dual", "h")
    for n, value in last.server.optimizer[total].items():
        kept = [run.client_state(i) for i in range(6)]
        mean = sum(k.strategy[group][n] for k in kept if k) / 6
        torch.testing.assert_close(value, mean, atol=1e-12, rtol=1e-9)
        assert value.abs().max() > 0


class Fragile(nn.Module):
    """A head whose gradient is NaN at 0 while the loss is fine."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 4)
        self.head = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.body(x) + 0 * self.head.weight.abs().sum().sqrt()


@pytest.mark.parametrize("strategy", [None, LocalOnly()])
def test_a_local_head_that_is_not_finite_is_never_stored(tmp_path, strategy, caplog):
    args = arguments(
        tmp_path, num_rounds=2, num_local_epochs=1, per_client_batch_size=64,
        local_modules=["head"], quorum=0,
    )  # fmt: skip
    run = FederatedTrainer(Fragile(), args, named(), strategy=strategy)
    history = run.train()
    assert [r.refused for r in history] == [tuple((n, "not_finite") for n in WARDS)] * 2
    assert "client 'ward b': payload refused (not_finite): the local part" in caplog.text
    assert "first head.weight" in caplog.text
    assert [r.uplink_bytes for r in history] == [0, 0]
    assert all(run.client_state(name) is None for name in WARDS)


def test_a_strategys_state_that_is_not_finite_is_never_stored(tmp_path, caplog):
    class Overflows(Strategy):
        def next_kept(self, broadcast, kept, update, extra, steps):
            return {"sum": {n: t / 0 for n, t in update.items()}}

    run = FederatedTrainer(mlp(), arguments(tmp_path, quorum=0), named(), strategy=Overflows())
    history = run.train()
    assert history[0].refused == tuple((n, "not_finite") for n in WARDS)
    assert "the kept sum is not finite" in caplog.text
    assert all(run.client_state(name) is None for name in WARDS)


def test_a_client_whose_stored_state_is_broken_starts_anew(caplog):
    local, shared = {"h": torch.randn(2)}, {"w": torch.randn(3), "v": torch.randn(2)}
    moments = {"row": {"w": torch.randn(1)}, "step": {"h": torch.tensor(3.0)}}
    good = ClientState(local, {"control": {"w": torch.randn(3)}}, {"w": torch.randn(3)}, moments)
    assert usable_state(None, local, shared, "ward a") is None
    assert usable_state(good, local, shared, "ward a") is good
    assert not caplog.text
    nan = {"w": torch.tensor([1.0, float("nan"), 2.0])}
    for broken, says in (
        ({"local": {"h": torch.tensor([1.0, float("inf")])}}, "first h"),
        ({"local": {}}, "local part is not this model's"),
        ({"local": {"h": torch.randn(3)}}, "local part is not this model's"),
        ({"local": {"h": torch.randn(2).double()}}, "local part is not this model's"),
        ({"strategy": {"control": nan}}, "kept control is not finite"),
        ({"strategy": {"control": {"w": torch.randn(4)}}}, "kept control is not of"),
        ({"strategy": {"control": {"x": torch.randn(3)}}}, "kept control is not of"),
        ({"residual": nan}, "residual is not finite"),
        ({"optimizer": {"row": nan}}, "optimizer's row is not finite, first w"),
        ({"optimizer": {"row": {"x": torch.ones(1)}}}, "optimizer's row is not of this model's"),
        ({"residual": {"w": torch.randn(1)}}, "residual is not of"),
    ):
        caplog.clear()
        assert usable_state(dataclasses.replace(good, **broken), local, shared, "ward b") is None
        assert "client ward b starts anew" in caplog.text
        assert says in caplog.text
