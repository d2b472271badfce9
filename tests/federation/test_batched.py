"""Clients side by side are clients one after the other, up to rounding."""

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ArgumentsError,
    FedAdam,
    FedDyn,
    FederatedTrainer,
    FedProx,
    LocalOnly,
    Scaffold,
    partition,
)
from fedpara_peft.federation.client.stack.engine import BatchedTrainer


def data(examples=118):
    """In float64, so that engines differ by rounding alone."""
    x, y = toy(examples).tensors
    return TensorDataset(x.double(), y)


def run(folder, engine, build, strategy=None, clients=None, **changes):
    model = build().double()
    args = arguments(
        folder, **{"num_rounds": 4, "clients_per_round": 6, "engine": engine, **changes}
    )
    trainer = FederatedTrainer(
        model, args, clients or partition(data(), "iid", 8), strategy=strategy
    )
    return trainer, trainer.train()


def same(a, b):
    for (one, history), (other, again) in [(a, b)]:
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(
                value, other.model.state_dict()[name], atol=1e-10, rtol=1e-8, msg=name
            )
        for i in range(len(one.population)):
            x, y = (t.client_model(i).state_dict() for t in (one, other))
            for name, value in x.items():
                torch.testing.assert_close(value, y[name], atol=1e-10, rtol=1e-8, msg=name)
        for r, s in zip(history, again, strict=True):
            assert r.train_loss == pytest.approx(s.train_loss, rel=1e-9)
            assert (r.uplink_bytes, r.cohort) == (s.uplink_bytes, s.cohort)
            assert all(0 < report.slowest_client_s < report.seconds for report in (r, s))


@pytest.fixture
def stacked(monkeypatch):
    """The sizes of all stacks that were trained."""
    sizes, train = [], BatchedTrainer.train

    def watched(self, clients, *rest):
        sizes.append(len(clients))
        return train(self, clients, *rest)

    monkeypatch.setattr(BatchedTrainer, "train", watched)
    return sizes


@pytest.mark.parametrize("kind", ["dense", "fedpara", "pfedpara", "lowrank"])
@pytest.mark.parametrize(
    "strategy", [None, FedProx(0.5), Scaffold(), FedDyn(0.2), FedAdam(), LocalOnly()]
)
def test_batched_is_sequential(tmp_path, stacked, kind, strategy):
    def build():
        if kind == "dense":
            return mlp(norm=False)
        return adapted(mlp(norm=False), parameterization=kind)

    one = run(tmp_path / "a", "sequential", build, strategy)
    assert not stacked
    other = run(tmp_path / "b", "batched", build, strategy)
    assert stacked
    same(one, other)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 0.01},
        {"max_grad_norm": 0.05},
        {"factor_schedule": "one_block"},
        {"uplink_codec": "topk:0.3+int8", "error_feedback": True, "learning_rate": 1e-3},
        {"local_modules": ["4"], "drop_out_probability": 0.3},
    ],
)
def test_settings_mean_the_same(tmp_path, stacked, settings):
    def build():
        return adapted(mlp(norm=False))

    one = run(tmp_path / "a", "sequential", build, Scaffold(), **settings)
    other = run(tmp_path / "b", "batched", build, Scaffold(), **settings)
    assert stacked
    if "uplink_codec" not in settings:  # rounding decides a quantized value here and there
        same(one, other)
    for r, s in zip(one[1], other[1], strict=True):
        assert r.train_loss == pytest.approx(s.train_loss, rel=1e-3)


class Spectral(nn.Module):
    """Learns a filter in the frequency domain."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 9, dtype=torch.complex128))

    def forward(self, x):
        return (torch.fft.rfft(x)[:, None] * self.filter).abs().mean(-1)

    def double(self):
        return self  # which would drop the imaginary parts


@pytest.mark.parametrize("settings", [{"max_grad_norm": 0.05}, {"clip_update_norm": 0.1}])
@pytest.mark.parametrize("strategy", [FedDyn(), FedAdam()])
def test_complex_parameters_do(tmp_path, stacked, strategy, settings):
    def build():
        torch.manual_seed(0)
        return Spectral()

    one = run(tmp_path / "a", "sequential", build, strategy, **settings)
    other = run(tmp_path / "b", "batched", build, strategy, **settings)
    assert stacked
    same(one, other)


def test_clients_of_another_size_go_alone(tmp_path, stacked):
    whole = data(116)
    clients = [torch.utils.data.Subset(whole, range(i, i + n)) for i, n in
               [(0, 20), (20, 12), (32, 20), (52, 20), (72, 17), (89, 20)]]  # fmt: skip

    def build():
        return adapted(mlp(norm=False))

    one = run(tmp_path / "a", "sequential", build, None, clients)
    other = run(tmp_path / "b", "batched", build, None, clients)
    assert set(stacked) == {4}
    same(one, other)


def test_it_chooses_itself_where_that_is_known_to_pay(tmp_path, stacked):
    def small():
        return adapted(mlp(norm=False))

    def large():
        return mlp(width=256, norm=False)

    run(tmp_path / "a", "auto", small, clients=partition(data(120), "iid", 6))
    assert not stacked  # too few clients
    many = partition(data(120), "iid", 12)
    run(tmp_path / "b", "auto", large, clients=many, clients_per_round=12)
    assert not stacked  # too large
    run(tmp_path / "c", "auto", small, clients=many, clients_per_round=12)
    assert set(stacked) == {12}


@pytest.mark.parametrize(
    ("build", "settings", "says"),
    [
        (lambda: mlp(), {}, "use group norm"),
        (lambda: nn.Sequential(mlp(norm=False), nn.Dropout(0.1)), {}, "dropout"),
        (lambda: mlp(norm=False), {"gradient_accumulation_steps": 2}, "accumulation"),
    ],
)
def test_what_cannot_be_stacked_is_said(tmp_path, build, settings, says):
    with pytest.raises(ArgumentsError, match=says):
        run(tmp_path, "batched", build, **settings)
