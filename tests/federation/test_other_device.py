"""A run on an accelerator, of which there is none here: on one that is as strict as they are."""

import pytest
import torch
from tests.federation.runs import STRATEGIES
from tests.federation.test_trainer import arguments, toy
from tests.other_device import DEVICE, other_device
from tests.zoo import adapted, mlp
from torch import nn

from fedpara_peft import FederatedTrainer, accuracy, partition

NORMS = {  # with batch norm, whose counters are integers
    "FedAvg": {},
    "codec": {"uplink_codec": "topk:0.2+int4", "downlink_codec": "int8", "error_feedback": True},
    "median": {"aggregation": "median"},
}
PLAIN = {
    "Scaffold": {"strategy": "Scaffold"},
    "FedDyn": {"strategy": "FedDyn"},
    "FedAdam": {"strategy": "FedAdam"},
    "noise": {
        "parameterization": "fedpara", "clip_update_norm": 1.0, "dp_noise_multiplier": 0.1,
        "dp_noise_seed": 7,
    },
    "local noise": {
        "parameterization": "fedpara", "clip_update_norm": 1.0, "dp_noise_multiplier": 0.1,
        "dp_mode": "local", "dp_noise_seed": 7,
    },
    "secure": {"secure_aggregation": True, "secure_clip": 0.5},
    "kept": {"optim": "adamw", "optimizer_state": "keep", "learning_rate": 0.01, "momentum": 0.0},
    "stacked": {"engine": "batched"},
    "one block": {"parameterization": "fedpara", "factor_schedule": "one_block"},
    "seeded": {"parameterization": "fedpara", "base_weight": "seeded"},
    "late": {"buffer_size": 2},
}  # fmt: skip


def run(folder, *, norm, strategy="FedAvg", parameterization="pfedpara", base_weight="replaced",
        exact=False, **settings):  # fmt: skip
    """What a run ends with, on the CPU: the global model, the personal ones and the losses."""
    torch.manual_seed(0)
    config = {"base_weight": base_weight, "remainder": exact}
    model = adapted(mlp(norm=norm), parameterization=parameterization, **config)
    clients = partition(toy(), "iid", 4)
    settings = {"num_rounds": 2, "clients_per_round": 2, "save_every": 0, **settings}
    run = FederatedTrainer(
        model, arguments(folder, exact_average=exact, **settings), clients, toy(),
        compute_metrics=accuracy, strategy=STRATEGIES[strategy],
        client_seconds=[1.0, 2.0, 3.0, 4.0] if "buffer_size" in settings else None,
    )  # fmt: skip
    run.train()
    models = [run.model, *map(run.client_model, range(4))]
    states = [{n: t.cpu() for n, t in model.state_dict().items()} for model in models]
    return (
        states,
        [report.train_loss for report in run.history],
        {p.device for p in run.model.parameters()},
    )


def same(found, expected):
    for state, wanted in zip(found[0], expected[0], strict=True):
        for name, tensor in wanted.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
    for loss, wanted in zip(found[1], expected[1], strict=True):  # None: noise has none
        assert loss == wanted or loss == pytest.approx(wanted, rel=1e-5)
    assert found[2] == {DEVICE}


@pytest.mark.parametrize("case", [*NORMS, *PLAIN])
def test_a_run_is_that_of_the_cpu(tmp_path, case):
    settings = {"norm": case in NORMS, **NORMS.get(case, {}), **PLAIN.get(case, {})}
    expected = run(tmp_path / "cpu", **settings)
    with other_device():
        found = run(tmp_path / "other", **settings)
    same(found, expected)


def test_the_exact_average_is_that_of_the_cpu(tmp_path):
    settings = {"norm": False, "parameterization": "fedpara", "base_weight": "frozen"}
    expected = run(tmp_path / "cpu", exact=True, **settings)
    with other_device():
        found = run(tmp_path / "other", exact=True, **settings)
    same(found, expected)


def test_the_device_is_as_strict_as_a_real_one():
    with other_device():
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="on the same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, generator=torch.Generator(), device=DEVICE)
        for make in (
            lambda: there.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        ):
            with pytest.raises(TypeError, match="float64"):
                make()
        layer = nn.Linear(3, 2).to(DEVICE)
        layer(there).sum().backward()
        assert layer.weight.grad.device == DEVICE
        assert (2 * there).cpu().tolist() == [2, 2, 2]
