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
    FedDyn,
    FederatedArguments,
    FederatedTrainer,
    FedProx,
    FedYogi,
    LocalOnly,
    Scaffold,
    partition,
)
from fedpara_peft.federation.random import torch_generator
from fedpara_peft.federation.server.sampling import sample_cohort
from fedpara_peft.federation.state import CohortMean, ServerState


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 16, generator=generator)
    return TensorDataset(x, (x @ torch.randn(16, 4, generator=generator)).argmax(1))


def run(tmp_path, strategy, clients=None, model=None, **changes):
    model = model or adapted(mlp())
    settings = {"num_rounds": 3, "clients_per_round": 3, "per_client_batch_size": 8, **changes}
    args = FederatedArguments(
        str(tmp_path), disable_tqdm=True, overwrite_output_dir=True, **settings
    )
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


def local_steps(model, start, rows, settings, number, client, correct):
    """A client's turn written out; its weights afterwards and the number of steps."""
    for p, w in zip(model.parameters(), start, strict=True):
        p.data = w.clone()
    steps = 0
    for epoch in range(settings["num_local_epochs"]):
        generator = torch_generator(0, number, client, f"batches {epoch}")
        order = torch.randperm(len(rows), generator=generator)
        for part in order.split(settings["per_client_batch_size"]):
            x, y = (torch.stack(c) for c in zip(*[rows[j] for j in part.tolist()], strict=True))
            grads = torch.autograd.grad(
                nn.functional.cross_entropy(model(x), y), list(model.parameters())
            )
            for i, (p, g) in enumerate(zip(model.parameters(), grads, strict=True)):
                p.data = p.data - 0.1 * (g + correct(i, p.data))
            steps += 1
    return [p.data for p in model.parameters()], steps


def scaffold_by_hand(model, clients, settings):
    x = [p.detach().clone() for p in model.parameters()]
    zeros = [torch.zeros_like(w) for w in x]
    c, own = zeros, dict.fromkeys(range(len(clients)), zeros)
    for number in range(settings["num_rounds"]):
        cohort = sample_cohort([1] * len(clients), settings["clients_per_round"], 0, number)
        moves, changes = [], []
        for i in cohort:
            y, K = local_steps(
                model,
                x,
                clients[i],
                settings,
                number,
                i,
                lambda k, w, c=c, own=own[i]: c[k] - own[k],
            )
            new = [o - s + (w - v) / (K * 0.1) for o, s, w, v in zip(own[i], c, x, y, strict=True)]
            moves.append([v - w for w, v in zip(x, y, strict=True)])
            changes.append([n - o for n, o in zip(new, own[i], strict=True)])
            own[i] = new
        x = [w + 0.7 * sum(d) / len(cohort) for w, *d in zip(x, *moves, strict=True)]
        c = [s + sum(d) / len(clients) for s, *d in zip(c, *changes, strict=True)]
    return x


def feddyn_by_hand(model, clients, settings):
    alpha, m = 0.3, len(clients)
    theta = [p.detach().clone() for p in model.parameters()]
    h = [torch.zeros_like(w) for w in theta]
    gradient = dict.fromkeys(range(m), h)  # the clients' ∇L_i at their last optimum
    for number in range(settings["num_rounds"]):
        cohort = sample_cohort([1] * m, settings["clients_per_round"], 0, number)
        found = []
        for i in cohort:
            y, _ = local_steps(
                model, theta, clients[i], settings, number, i,
                lambda k, w, t=theta, g=gradient[i]: alpha * (w - t[k]) - g[k],
            )  # fmt: skip
            gradient[i] = [
                g - alpha * (v - w) for g, v, w in zip(gradient[i], y, theta, strict=True)
            ]
            found.append(y)
        drift = [sum(v - w for v in ys) for w, *ys in zip(theta, *found, strict=True)]
        h = [a - alpha * d / m for a, d in zip(h, drift, strict=True)]
        theta = [sum(ys) / len(cohort) - a / alpha for a, *ys in zip(h, *found, strict=True)]
    return theta


@pytest.mark.parametrize(
    ("strategy", "by_hand"),
    [(Scaffold(server_learning_rate=0.7), scaffold_by_hand), (FedDyn(0.3), feddyn_by_hand)],
)
@pytest.mark.parametrize("num_rounds", [1, 4])
def test_control_variates_and_dynamic_regularizers_by_hand(tmp_path, strategy, by_hand, num_rounds):
    x, y = data().tensors
    clients = partition(TensorDataset(x.double(), y), "quantity", 4, concentration=2.0)
    settings = {
        "num_rounds": num_rounds, "clients_per_round": 3, "num_local_epochs": 2,
        "per_client_batch_size": 16,
    }  # fmt: skip
    expected = by_hand(mlp(norm=False).double(), clients, settings)
    ours = run(tmp_path, strategy, clients, mlp(norm=False).double(), **settings)
    for p, w in zip(ours.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w, atol=1e-12, rtol=1e-9)


def test_extra_traffic_is_counted(tmp_path):
    def sent(strategy):
        model = adapted(mlp(norm=False))
        args = FederatedArguments(
            str(tmp_path),
            num_rounds=2,
            clients_per_round=3,
            disable_tqdm=True,
            overwrite_output_dir=True,
        )
        history = FederatedTrainer(
            model, args, partition(data(), "iid", 5), strategy=strategy
        ).train()
        tensors = [
            part - header / 2
            for report in history
            for part, header in [
                (report.uplink_bytes, report.header_bytes),
                (report.downlink_bytes, report.header_bytes),
            ]
        ]
        return tensors

    plain = sent(FedAvg())
    assert sent(FedDyn()) == plain
    assert sent(Scaffold()) == [2 * size for size in plain]  # both ways, in every round
    assert sent(LocalOnly()) == [0] * 4


def second(strategy, v, square):
    if isinstance(strategy, FedAdagrad):
        return v + square
    if isinstance(strategy, FedAdam):
        return strategy.beta2 * v + (1 - strategy.beta2) * square
    return v - (1 - strategy.beta2) * square * np.sign(v - square)


@pytest.mark.parametrize(
    "strategy", [FedAdam(0.1, 0.8, 0.95, 0.01), FedYogi(0.1, 0.8, 0.95, 0.01), FedAdagrad(0.1)]
)
def test_adaptive_server_steps_take_a_complex_number_for_two_real_ones(strategy):
    generator = torch.Generator().manual_seed(0)
    whole = ServerState(0, {"w": torch.zeros(5, dtype=torch.complex64)})
    parts = ServerState(0, {"w": torch.zeros(5, 2)})
    for _ in range(4):
        delta = torch.randn(5, 2, generator=generator)
        whole = strategy.server_step(whole, CohortMean({"w": torch.view_as_complex(delta)}))
        parts = strategy.server_step(parts, CohortMean({"w": delta}))
        assert torch.equal(torch.view_as_real(whole.params["w"]), parts.params["w"])


@pytest.mark.parametrize(
    "strategy", [FedAdam(0.1, 0.8, 0.95, 0.01), FedYogi(0.1, 0.8, 0.95, 0.01), FedAdagrad(0.1)]
)
def test_adaptive_server_steps_against_numpy(strategy):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(6)
    m, v = np.zeros(6), np.full(6, strategy.tau**2)
    server = ServerState(0, {"w": torch.tensor(w)})
    for number in range(4):
        delta = rng.standard_normal(6)
        server = strategy.server_step(server, CohortMean({"w": torch.tensor(delta)}))
        m = strategy.beta1 * m + (1 - strategy.beta1) * delta
        v = second(strategy, v, delta**2)
        w = w + strategy.server_learning_rate * m / (np.sqrt(v) + strategy.tau)
        np.testing.assert_allclose(server.params["w"].numpy(), w, rtol=1e-12)
        assert server.round == number + 1


def test_momentum_by_hand():
    server = ServerState(0, {"w": torch.zeros(2)})
    strategy = FedAvgM(server_momentum=0.5, server_learning_rate=2.0)
    for expected in (2.0, 5.0, 8.5):  # v = 1, 1.5, 1.75
        server = strategy.server_step(server, CohortMean({"w": torch.ones(2)}))
        assert server.params["w"].tolist() == [expected, expected]


@pytest.mark.parametrize(
    "strategy", [FedAvgM(), FedAdam(), FedYogi(), FedAdagrad(), FedProx(), Scaffold(), FedDyn()]
)
def test_defaults_train(tmp_path, strategy):
    model = run(tmp_path, strategy, num_rounds=25, num_local_epochs=2)
    x, y = data().tensors
    accuracy = (model.eval()(x).argmax(1) == y).double().mean()
    assert accuracy > 0.5
    assert (model.state_dict()["base_model.model.1.running_var"] > 0).all()
