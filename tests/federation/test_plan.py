"""The plan agrees with the bytes that are then counted."""

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp

from fedpara_peft import (
    ArgumentsError,
    FedDyn,
    FederatedTrainer,
    LocalOnly,
    Scaffold,
    partition,
    plan,
)


@pytest.mark.parametrize("strategy", [None, Scaffold(), FedDyn(), LocalOnly()])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"uplink_codec": "topk:0.2+int8", "downlink_codec": "bfloat16"},
        {"factor_schedule": "one_block", "num_rounds": 6, "uplink_codec": "int4"},
        {"local_modules": ["5"]},
    ],
)
@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "with batch norm"])
def test_planned_bytes_are_counted_bytes(tmp_path, strategy, settings, kind):
    def build():
        if kind == "with batch norm":
            return adapted(mlp())
        return adapted(mlp(norm=False), parameterization=kind)

    if "local_modules" in settings and kind != "with batch norm":
        settings = {"local_modules": ["4"]}
    args = arguments(tmp_path, **settings)
    planned = plan(build(), args, 5, strategy)
    run = FederatedTrainer(build(), args, partition(toy(), "iid", 5), strategy=strategy)
    history = run.train()
    assert planned.total_bytes == history.total_bytes
    for report, down, up in zip(history, planned.downlink_bytes, planned.uplink_bytes, strict=True):
        assert (report.downlink_bytes, report.uplink_bytes) == (3 * down, 3 * up)
        assert run.ledger.round_s(report.round, 10.0) == pytest.approx((down + up) * 8 / 1e7)
    assert planned.total_s(10.0, compute_s=2.0) == pytest.approx(
        sum(run.ledger.round_s(r.round, 10.0, 2.0) for r in history)
    )
    assert planned.energy_j(1e-7) == pytest.approx(run.ledger.energy_j(1e-7))


def test_drop_outs_in_expectation(tmp_path):
    args = arguments(tmp_path, num_rounds=300, drop_out_probability=0.3, eval_every=0)
    args.num_local_epochs, args.per_client_batch_size = 1, 64
    planned = plan(mlp(norm=False), args, 5)
    counted = FederatedTrainer(mlp(norm=False), args, partition(toy(), "iid", 5)).train()
    assert planned.total_bytes == pytest.approx(counted.total_bytes, rel=0.03)


def test_a_plan_needs_no_weights(tmp_path):
    with torch.device("meta"):
        large = torch.nn.Linear(20_000, 20_000)
    planned = plan(large, arguments(tmp_path, num_rounds=2), 10)
    assert planned.num_values == 20_000 * 20_001
    assert "2 rounds of 3 of 10 clients" in str(planned)
    assert "1.60 GB down" in str(planned)


def test_with_ranks_of_their_own_all_clients_together_send_what_is_planned(tmp_path):
    ranks = [1, 2, 3, 1]
    args = arguments(tmp_path, clients_per_round=4)
    planned = plan(adapted(mlp(norm=False), r=3), args, 4, client_ranks=ranks)
    clients = partition(toy(), "iid", 4)
    model = adapted(mlp(norm=False), r=3)
    history = FederatedTrainer(model, args, clients, client_ranks=ranks).train()
    per_round = 4 * (planned.downlink_bytes[0] + planned.uplink_bytes[0])
    counted = history[0].downlink_bytes + history[0].uplink_bytes
    assert abs(per_round - counted) <= 4  # a mean in whole bytes
    assert planned.total_bytes < plan(adapted(mlp(norm=False), r=3), args, 4).total_bytes


def test_the_exact_average_is_not_planned(tmp_path):
    with pytest.raises(ArgumentsError, match="exact_average cannot be planned"):
        plan(adapted(mlp(norm=False)), arguments(tmp_path, exact_average=True), 5)
