"""The bias of averaging factors, and the schedule that has none."""

import itertools

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import Net, adapted, mlp, net_inputs, randomize

from fedpara_peft import (
    ArgumentsError,
    FedAdam,
    FedAvg,
    FederatedTrainer,
    FedProx,
    Scaffold,
    partition,
)
from fedpara_peft.federation.server.schedule import factor_blocks, resting_factors


def trainer(folder, model=None, strategy=None, **changes):
    model = model or adapted(mlp(norm=False))
    args = arguments(folder, report_averaging_bias=True, learning_rate=0.3, **changes)
    return FederatedTrainer(
        model, args, partition(toy(), "dirichlet", 4, concentration=1.0), strategy=strategy
    )


def test_the_measured_bias(tmp_path):
    """Against the composed weights of every client, in float64."""
    model = adapted(mlp(norm=False)).double()
    x, y = toy().tensors
    data = torch.utils.data.TensorDataset(x.double(), y)
    clients = partition(data, "dirichlet", 4, concentration=1.0)
    args = arguments(
        tmp_path, num_rounds=1, clients_per_round=4, report_averaging_bias=True, learning_rate=0.3
    )
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]

    def weights():
        return torch.cat([m.get_delta_weight("default").detach().flatten() for m in layers])

    found, before = [], weights()
    run = FederatedTrainer(model, args, clients)
    turn = run._local.train

    def watched(*a):
        result = turn(*a)
        found.append((len(clients[a[0]]), weights()))
        return result

    run._local.train = watched
    history = run.train()
    total = sum(n for n, _ in found)
    exact = sum(n / total * w for n, w in found)
    expected = (exact - weights()).norm() / (exact - before).norm()
    assert history[0].averaging_bias == pytest.approx(float(expected), rel=1e-6)
    assert float(expected) > 0.01


@pytest.mark.parametrize("parameterization", ["fedpara", "pfedpara", "lowrank"])
@pytest.mark.parametrize("strategy", [None, Scaffold(), FedAdam(), FedProx(0.1)])
def test_one_block_a_round_is_exact(tmp_path, parameterization, strategy):
    model = adapted(mlp(norm=False), parameterization=parameterization)
    blocks = 4 if parameterization == "fedpara" else 2
    strategy = strategy or FedAvg()
    seen = []

    class Watch(type(strategy)):
        def server_step(self, server, mean):
            seen.append(set(mean.update))
            return super().server_step(server, mean)

    one = trainer(
        tmp_path, model, Watch(**vars(strategy)), factor_schedule="one_block", num_rounds=2 * blocks
    )
    products = factor_blocks(model)
    assert {len(p) for p in products} == {blocks}
    history = one.train()
    assert all(r.averaging_bias < 1e-5 for r in history)
    factors = {name for p in products for name in p}
    assert len(seen) == 2 * blocks
    for number, names in enumerate(seen):
        changed = names & factors
        assert changed == factors - resting_factors(products, number)
        assert len(changed) == len(products)
    # The upload: the factors' share in turn, everything else always.
    every = adapted(mlp(norm=False), parameterization=parameterization)
    always = trainer(tmp_path / "all", every, type(strategy)())
    whole = always.train()
    sizes = {r.uplink_bytes for r in history}
    assert max(sizes) < whole[0].uplink_bytes
    if not isinstance(strategy, Scaffold):  # whose controls rest with their factors
        assert {r.downlink_bytes for r in history} == {whole[0].downlink_bytes}
    assert whole[0].averaging_bias > 10 * max(r.averaging_bias for r in history)


def test_with_tanh_one_block_is_not_exact_and_says_so(tmp_path, caplog):
    trainer(tmp_path / "plain", factor_schedule="one_block")
    assert not caplog.text
    model = randomize(adapted(mlp(norm=False), nonlinearity="tanh"))
    run = trainer(tmp_path, model, factor_schedule="one_block", num_rounds=4)
    assert "has 'tanh'" in caplog.text
    assert "report_averaging_bias=True" in caplog.text
    assert max(report.averaging_bias for report in run.train()) > 1e-4  # exact: below 1e-5


def test_resting_factors_do_not_move(tmp_path):
    model = adapted(mlp(norm=False))
    run = trainer(tmp_path, model, FedAdam(), factor_schedule="one_block", num_rounds=5)
    states = [{k: v.clone() for k, v in model.state_dict().items()}]
    run.callbacks.append(
        type("Keep", (), {
            "on_train_begin": lambda s, server: None,
            "on_train_end": lambda s, server, h: None,
            "on_round_end": lambda s, server, r: states.append(
                {k: v.clone() for k, v in model.state_dict().items()}
            ),
        })()
    )  # fmt: skip
    run.train()
    products = factor_blocks(model)
    for number, (a, b) in enumerate(itertools.pairwise(states)):
        moved = {k for k in a if not torch.equal(a[k], b[k])}
        assert not moved & resting_factors(products, number)
        assert moved >= {p[number % 4] for p in products}
    assert all(p.requires_grad for n, p in model.named_parameters() if "fedpara_" in n)


def test_every_layer_kind_has_its_own_cycle():
    model = randomize(adapted(Net()))
    products = factor_blocks(model)
    kernels = [p for p in products if any("_t." in name for name in p)]
    assert {len(p) for p in kernels} == {6}
    assert {len(p) for p in products} == {4, 6}
    named = dict(model.named_parameters())
    images, ids = net_inputs()
    before = model(images, ids).detach()
    for number in range(6):  # linear in what moves: half way is half the change
        moving = [p[number % len(p)] for p in kernels]
        kept = {n: named[n].detach().clone() for n in moving}
        weight = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
        start = weight.get_delta_weight("default").detach().clone()
        steps = {n: torch.randn_like(kept[n]) for n in moving}
        ends = []
        for factor in (0.5, 1.0):
            for n in moving:
                named[n].data = kept[n] + factor * steps[n]
            ends.append(weight.get_delta_weight("default").detach() - start)
        torch.testing.assert_close(2 * ends[0], ends[1], atol=1e-4, rtol=1e-4)
        for n in moving:
            named[n].data = kept[n]
    torch.testing.assert_close(model(images, ids), before)


def test_a_model_without_products_is_refused(tmp_path):
    with pytest.raises(ArgumentsError, match="the model has none"):
        trainer(tmp_path, mlp(), factor_schedule="one_block")
