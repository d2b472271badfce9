"""What a strategy declares: what travels, which settings it allows, how steps are weighed."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from sklearn.datasets import load_digits
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ArgumentsError,
    FedAvg,
    FedDyn,
    FederatedTrainer,
    Scaffold,
    Strategy,
    communicated_state,
    partition,
    plan,
)
from fedpara_peft.federation.client.step_weights import StepWeights, clip_scale
from fedpara_peft.federation.strategies import LocalSteps
from fedpara_peft.federation.strategies.base import advance, moment

PRIVATE = {"clip_update_norm": 1.0, "dp_noise_multiplier": 1.0}


def trainer(folder, strategy, model=None, **changes):
    clients = partition(toy(), "iid", 5)
    return FederatedTrainer(
        model or mlp(), arguments(folder, **changes), clients, strategy=strategy
    )


@dataclass(frozen=True)
class SendsUp(Strategy):
    """Sends its update's square along, which the server keeps a mean of."""

    uplink: ClassVar[tuple[str, ...]] = ("square",)

    def client_extra(self, broadcast, kept, update, steps):
        return {"square": {n: t**2 for n, t in update.items()}}

    def server_step(self, server, mean):
        return advance(server, mean.update, {"square": mean.extra["square"]})


@dataclass(frozen=True)
class SendsDown(Strategy):
    """Sends the last mean update down."""

    downlink: ClassVar[tuple[str, ...]] = ("last",)

    def broadcast(self, server):
        return {"last": moment(server, "last")}

    def server_step(self, server, mean):
        return advance(server, mean.update, {"last": mean.update})


@pytest.mark.parametrize("schedule", ["all", "one_block"])
@pytest.mark.parametrize(("strategy", "up", "down"), [(SendsUp(), 2, 1), (SendsDown(), 1, 2)])
def test_a_strategy_of_ones_own_sends_one_way_alone(tmp_path, strategy, up, down, schedule):
    """Its bytes are counted and foretold, batch norm's buffers are none of its business."""
    run = trainer(tmp_path, strategy, adapted(mlp()), factor_schedule=schedule)
    foretold = plan(adapted(mlp()), run.args, 5, strategy)
    history = run.train()
    assert history.total_bytes == foretold.total_bytes
    plain = trainer(tmp_path / "plain", FedAvg(), adapted(mlp()), factor_schedule=schedule)
    expected = plain.train()
    values = sum(
        t.numel() for n, t in communicated_state(run.model).items() if n in run._local.parameters
    )
    for report, bare in zip(history, expected, strict=True):
        assert report.uplink_bytes > bare.uplink_bytes or up == 1
        assert report.downlink_bytes > bare.downlink_bytes or down == 1
        if schedule == "all":
            headers = report.header_bytes - bare.header_bytes
            more = report.uplink_bytes + report.downlink_bytes - headers
            assert more - bare.uplink_bytes - bare.downlink_bytes == 3 * 4 * values


@pytest.mark.parametrize(
    ("strategy", "first"),
    [(SendsUp(), "square/"), (SendsDown(), "last/"), (Scaffold(), "control/")],
)
def test_what_travels_beside_updates_is_refused_with_noise(tmp_path, strategy, first):
    pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
    with pytest.raises(ArgumentsError, match=rf"would not be protected, first \['{first}"):
        trainer(tmp_path, strategy, mlp(norm=False), **PRIVATE)


def test_how_many_came_is_told_to_no_strategy_with_noise(tmp_path):
    pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
    seen = []

    class Watches(Strategy):
        def server_step(self, server, mean):
            seen.append(mean.share)
            return advance(server, mean.update)

    settings = {"clients_per_round": 4, "drop_out_probability": 0.4, "num_rounds": 6}
    history = trainer(tmp_path, Watches(), mlp(norm=False), **settings, **PRIVATE).train()
    assert len({len(r.dropped) for r in history}) > 1
    assert seen == [pytest.approx(4 * 0.6 / 5)] * 6
    seen.clear()
    trainer(tmp_path / "plain", Watches(), mlp(norm=False), **settings).train()
    assert seen == [(4 - len(r.dropped)) / 5 for r in history]


@pytest.mark.parametrize(
    ("strategy", "settings", "says"),
    [
        (Scaffold(), {"client_sampling": "weighted"}, "Scaffold cannot have client_sampling='weig"),
        (FedDyn(), {"client_sampling": "weighted"}, "FedDyn cannot have client_sampling='weighted"),
        (Scaffold(), {"aggregation": "median"}, "Scaffold cannot have aggregation='median'"),
        (FedDyn(), {"aggregation": "trimmed_mean:0.1"}, "FedDyn cannot have aggregation='trimmed"),
        (FedDyn(), PRIVATE, "FedDyn cannot have dp_noise_multiplier"),
        (
            Scaffold(),
            {"weight_decay": 0.1, "max_grad_norm": 1.0},
            "Scaffold cannot have weight_decay and max_grad_norm together",
        ),
        (
            Scaffold(),
            {"momentum": 0.9, "optimizer_state": "keep"},
            "Scaffold cannot have momentum and optimizer_state='keep' together",
        ),
    ],
)
def test_settings_that_a_strategys_algebra_does_not_allow(tmp_path, strategy, settings, says):
    with pytest.raises(ArgumentsError, match=says):
        trainer(tmp_path, strategy, mlp(norm=False), **settings)
    with pytest.raises(ArgumentsError, match=says):
        plan(mlp(norm=False), arguments(tmp_path, **settings), 5, strategy)
    trainer(tmp_path, FedAvg(), mlp(norm=False), **settings)


def test_a_strategy_sends_what_it_declares_and_no_more(tmp_path):
    class Silent(SendsUp):
        def client_extra(self, broadcast, kept, update, steps):
            return {}

    class Undeclared(Strategy):
        def broadcast(self, server):
            return {"last": moment(server, "last")}

    class Partly(SendsUp):
        def client_extra(self, broadcast, kept, update, steps):
            return {"square": dict(list(update.items())[1:])}

    class Wider(SendsDown):
        def broadcast(self, server):
            return {"last": {n: t.double() for n, t in moment(server, "last").items()}}

    class Taken(SendsUp):
        uplink = ("buffers",)

    for strategy, says in (
        (Silent(), r"Silent sends \[\] on the uplink, but declares \['square'\]"),
        (Undeclared(), r"Undeclared sends \['last'\] on the downlink, but declares \[\]"),
        (Partly(), r"'square' with other tensors.*1 differ, first \['0.weight'\]"),
        (Wider(), r"'last' with other tensors.*8 differ"),
        (Taken(), "declares a group 'buffers': give it another name"),
    ):
        with pytest.raises(ArgumentsError, match=says):
            trainer(tmp_path / type(strategy).__name__, strategy).train()


def test_scaffold_without_knowing_the_steps_weights_is_refused():
    with pytest.raises(ArgumentsError, match="what the local optimizer makes of a gradient"):
        Scaffold().client_extra(None, {}, {}, LocalSteps(3, 0.1))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("bound", [None, 2.0])
def test_weights_of_steps_are_what_torchs_sgd_makes_of_gradients(momentum, bound):
    """With the gradient 3 in every step the weights are all that w moves by."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.25, momentum=momentum)
    weights = StepWeights(momentum)
    for steps in range(1, 12):
        optimizer.zero_grad()
        (3 * w).sum().backward()
        scale = 1.0
        if bound is not None:
            scale = clip_scale(torch.nn.utils.clip_grad_norm_([w], bound), bound)
            assert float(scale) == pytest.approx(2 / 3, rel=1e-5)
        weights.step(scale)
        optimizer.step()
        assert float(weights.total) == pytest.approx(-w.item() / (0.25 * 3), rel=1e-12)
        if bound is None:
            b = momentum
            closed = (steps - b * (1 - b**steps) / (1 - b)) / (1 - b)
            assert weights.total == pytest.approx(closed, rel=1e-12)


def test_momentum_does_not_blow_scaffold_up(tmp_path):
    """Unequal clients, momentum 0.9: controls ten times too large would double in every round."""
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    data = TensorDataset(inputs[:600], labels[:600])
    torch.manual_seed(0)
    args = arguments(
        tmp_path, num_rounds=10, clients_per_round=8, momentum=0.9, learning_rate=0.05,
        per_client_batch_size=16, eval_every=10,
    )  # fmt: skip
    clients = partition(data, "dirichlet", 8, concentration=0.1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    run = FederatedTrainer(model, args, clients, data, strategy=Scaffold())
    assert run.train()[-1].metrics["eval_loss"] < 1
