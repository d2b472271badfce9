"""Noise that clients add, over Flower: the simulation's where it may be known, else their own."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from tests.federation.test_private_clients import LOCAL, SHARED
from tests.integrations import secure_task as task
from tests.integrations.test_flower_secure import (
    _task,  # noqa: F401  a fixture
    assert_same_state,
    history,
    run,
    simulate,
)

from fedpara_peft.integrations.flower import client_app

ON_NODES = {
    "local": {**LOCAL, "secure_aggregation": False, "secure_clip": None},
    "distributed": {**SHARED, "secure_clip": 0.1},
}


@pytest.mark.parametrize("mode", ON_NODES)
def test_over_flower_clients_add_the_simulations_noise(tmp_path, mode):
    more = {**ON_NODES[mode], "dp_noise_seed": 4}
    grid = run(tmp_path, save_every=1, **more)
    trainer = simulate(tmp_path, **more)
    assert_same_state(tmp_path)
    timeless = {"seconds": 0.0, "slowest_client_s": None}
    assert [dataclasses.replace(r, **timeless) for r in history(tmp_path)] == [
        dataclasses.replace(r, **timeless) for r in trainer.history
    ]
    answers = [m.content["metrics"] for m in grid.wire if "metrics" in m.content]
    assert all(metrics["train_loss"] == 0.0 for metrics in answers)


def test_a_nodes_noise_is_its_own_secret(tmp_path):
    """Two runs of one seed differ, and so do two nodes' draws of one client."""
    found = []
    for name in "ab":
        run(tmp_path / name, save_every=1, num_rounds=1, **ON_NODES["local"])
        found.append(load_file(tmp_path / name / "server" / "checkpoint-1" / "server.safetensors"))
    trained = [name for name in found[0] if not name.startswith("first_local/")]
    assert not any(torch.equal(found[0][name], found[1][name]) for name in trained)


def test_a_node_with_less_noise_than_agreed_on_trains_nobody(tmp_path, caplog):
    more = ON_NODES["local"]
    args = [
        task.arguments(tmp_path / "server", **{**more, "dp_noise_multiplier": z})
        for z in (0.7, 0.1)
    ]
    apps = [client_app(task.model_fn, task.data_fn, args[c == 1]) for c in range(task.CLIENTS)]
    run(tmp_path, apps=apps, deadline_s=1.0, num_rounds=1, **more)
    assert "dp_noise_multiplier: 0.7 here, 0.1 there" in caplog.text
    assert history(tmp_path)[0].dropped == (1,)
