"""Strategies against their equations written out."""

import numpy as np
import pytest
import torch
from tests.zoo import adapted, mlp
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FederatedArguments,
    FederatedTrainer,
    FedProx,
    FedYogi,
    partition,
)
from fedpara_peft.federation.state import CohortMean, ServerState


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 16, generator=generator)
    return TensorDataset(x, (x @ torch.randn(16, 4, generator=generator)).argmax(1))


def run(tmp_path, strategy, clients=None, model=None, **changes):
    model = model or adapted(mlp())
    settings = {"num_rounds": 3, "clients_per_round": 3, "per_client_batch_size": 8, **changes}
    args = FederatedArguments(str(tmp_path), disable_tqdm=True, **settings)
    trainer = FederatedTrainer(
        model, args, clients or partition(data(), "iid", 5), strategy=strategy
    )
    trainer.train()
    return model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("plain", [FedProx(mu=0.0), FedAvgM(server_momentum=0.0)])
def test_neutral_settings_are_fedavg(tmp_path, plain):
    expected = run(tmp_path, FedAvg()).state_dict()
    assert same(run(tmp_path, plain).state_dict(), expected)
    assert not same(run(tmp_path, FedProx(mu=1.0)).state_dict(), expected)


def test_fedprox_is_the_proximal_loss(tmp_path):
    """One client, three local steps, against the loss with its term in it."""
    rows = data()
    clients = [TensorDataset(rows.tensors[0][:24], rows.tensors[1][:24])]
    ours = run(
        tmp_path, FedProx(mu=0.7), clients, mlp(norm=False), num_rounds=2, clients_per_round=1,
        per_client_batch_size=24, num_local_epochs=3, max_grad_norm=0.5,
    )  # fmt: skip
    twin = mlp(norm=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        start = [p.detach().clone() for p in twin.parameters()]
        for _ in range(3):
            loss = nn.functional.cross_entropy(twin(clients[0].tensors[0]), clients[0].tensors[1])
            for p, w in zip(twin.parameters(), start, strict=True):
                loss = loss + 0.35 * (p - w).square().sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def second(strategy, v, square):
    if isinstance(strategy, FedAdagrad):
        return v + square
    if isinstance(strategy, FedAdam):
        return strategy.beta2 * v + (1 - strategy.beta2) * square
    return v - (1 - strategy.beta2) * square * np.sign(v - square)


@pytest.mark.parametrize(
    "strategy", [FedAdam(0.1, 0.8, 0.95, 0.01), FedYogi(0.1, 0.8, 0.95, 0.01), FedAdagrad(0.1)]
)
def test_adaptive_server_steps_against_numpy(strategy):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(6)
    m, v = np.zeros(6), np.full(6, strategy.tau**2)
    server = ServerState(0, {"w": torch.tensor(w), "count": torch.tensor(3)}, buffers={"count"})
    for number in range(4):
        delta = rng.standard_normal(6)
        server = strategy.server_step(
            server, CohortMean({"w": torch.tensor(delta), "count": torch.tensor(2)})
        )
        m = strategy.beta1 * m + (1 - strategy.beta1) * delta
        v = second(strategy, v, delta**2)
        w = w + strategy.server_learning_rate * m / (np.sqrt(v) + strategy.tau)
        np.testing.assert_allclose(server.params["w"].numpy(), w, rtol=1e-12)
        assert server.params["count"] == 3 + 2 * (number + 1)  # a buffer takes its plain mean
        assert server.round == number + 1


def test_momentum_by_hand():
    server = ServerState(0, {"w": torch.zeros(2)})
    strategy = FedAvgM(server_momentum=0.5, server_learning_rate=2.0)
    for expected in (2.0, 5.0, 8.5):  # v = 1, 1.5, 1.75
        server = strategy.server_step(server, CohortMean({"w": torch.ones(2)}))
        assert server.params["w"].tolist() == [expected, expected]


@pytest.mark.parametrize("strategy", [FedAvgM(), FedAdam(), FedYogi(), FedAdagrad(), FedProx()])
def test_defaults_train(tmp_path, strategy):
    model = run(tmp_path, strategy, num_rounds=25, num_local_epochs=2)
    x, y = data().tensors
    accuracy = (model.eval()(x).argmax(1) == y).double().mean()
    assert accuracy > 0.5
    assert (model.state_dict()["base_model.model.1.running_var"] > 0).all()
