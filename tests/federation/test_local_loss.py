"""Strategies that own the local objective, in forty lines each, against hand-written twins."""

from dataclasses import dataclass

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp, randomize
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedpara_peft import (
    ArgumentsError,
    FedAvg,
    FederatedTrainer,
    FedProx,
    LocalOnly,
    Strategy,
    partition,
)
from fedpara_peft.federation.random import torch_generator
from fedpara_peft.federation.server.sampling import sample_cohort


def trainer(folder, strategy, model=None, **changes):
    settings = {"num_rounds": 4, "clients_per_round": 3, "momentum": 0.5, **changes}
    clients = partition(toy(), "quantity", 5, concentration=3.0)
    return FederatedTrainer(
        model or mlp(norm=False), arguments(folder, **settings), clients, strategy=strategy
    )


class Bound(nn.Module):
    """A loss function as a module, so that the model's parameters can be exchanged in it."""

    def __init__(self, model, compute_loss):
        super().__init__()
        self.model, self.compute = model, compute_loss

    def forward(self, batch):
        return self.compute(self.model, batch)


@dataclass(frozen=True)
class FedSAM(Strategy):
    """Minimize the loss at w + ρ ∇F/‖∇F‖ (arXiv:2206.02618)."""

    rho: float = 0.05

    def local_loss(self, model, batch, compute_loss, broadcast, kept):
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = compute_loss(model, batch).mean
        grads = torch.autograd.grad(loss, list(params.values()))
        norm = torch.stack([g.norm() for g in grads]).norm()
        worst = {
            f"model.{n}": p + self.rho * g / norm
            for (n, p), g in zip(params.items(), grads, strict=True)
        }
        return functional_call(Bound(model, compute_loss), worst, (batch,))


@dataclass(frozen=True)
class Moon(Strategy):
    """A model-contrastive term (arXiv:2103.16257), on outputs; the last local model is kept."""

    mu: float = 1.0
    tau: float = 0.5

    def local_loss(self, model, batch, compute_loss, broadcast, kept):
        found = compute_loss(model, batch)
        before = {**broadcast.params, **kept.get("model", {})}
        with torch.no_grad():
            z_global = functional_call(model, broadcast.params, (batch[0],))
            z_before = functional_call(model, before, (batch[0],))
        near = F.cosine_similarity(found.outputs, z_global) / self.tau
        far = F.cosine_similarity(found.outputs, z_before) / self.tau
        term = -(near - torch.logaddexp(near, far)).mean()
        return found._replace(mean=found.mean + self.mu * term)

    def next_kept(self, broadcast, kept, update, extra, steps):
        return {"model": {n: broadcast.params[n] + d for n, d in update.items()}}


@dataclass(frozen=True)
class Proximal(Strategy):
    """FedProx's term in the objective, not in the gradients."""

    mu: float = 0.1

    def local_loss(self, model, batch, compute_loss, broadcast, kept):
        found = compute_loss(model, batch)
        trained = dict(model.named_parameters())
        pull = sum((trained[n] - w).square().sum() for n, w in broadcast.params.items())
        return found._replace(mean=found.mean + self.mu / 2 * pull)


# Twins, without anything of the package but its derived randomness.


def by_hand(run, gradients, build):
    """FedAvg over clients whose gradients are given; the global state and mean losses."""
    args, data = run.args, run.population.train
    sizes = [len(d) for d in data]
    state = {n: t.clone() for n, t in build().state_dict().items()}
    kept, losses = {}, []
    for number in range(args.num_rounds):
        cohort = sample_cohort(sizes, args.clients_per_round, args.seed, number)
        total = sum(sizes[i] for i in cohort)
        mean = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in state.items()}
        spent = 0.0
        for i in cohort:
            model, w_t = build(), build()
            model.load_state_dict(state)
            w_t.load_state_dict(state)
            spent += train_by_hand(run, number, i, model, w_t, kept.get(i, w_t), gradients)
            kept[i] = model
            for n, t in model.state_dict().items():
                mean[n] += sizes[i] / total * t.double()
        losses.append(spent / (total * args.num_local_epochs))
        state = {n: t.float() for n, t in mean.items()}
    return state, losses


def train_by_hand(run, number, i, model, w_t, before, gradients):
    """A client's local epochs; the sum of its losses over rows."""
    args, client, spent = run.args, run.population.train[i], 0.0
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, args.momentum)
    for epoch in range(args.num_local_epochs):
        generator = torch_generator(args.seed, number, i, f"batches {epoch}")
        order = torch.randperm(len(client), generator=generator)
        for part in order.split(args.per_client_batch_size):
            rows = [client[j] for j in part.tolist()]
            x, y = (torch.stack(column) for column in zip(*rows, strict=True))
            optimizer.zero_grad()
            spent += gradients(model, x, y, w_t, before) * len(part)
            optimizer.step()
    return spent


def of_sam(model, x, y, w_t, before):
    F.cross_entropy(model(x), y).backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    climbed = [0.05 * p.grad / norm for p in model.parameters()]
    with torch.no_grad():
        for p, step in zip(model.parameters(), climbed, strict=True):
            p.add_(step)
            p.grad = None
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    with torch.no_grad():
        for p, step in zip(model.parameters(), climbed, strict=True):
            p.sub_(step)
    return loss.item()


def of_moon(model, x, y, w_t, before):
    out = model(x)
    a, b = out.norm(dim=1), (out * w_t(x).detach()).sum(1)
    near = (b / (a * w_t(x).detach().norm(dim=1)) / 0.5).exp()
    far = ((out * before(x).detach()).sum(1) / (a * before(x).detach().norm(dim=1)) / 0.5).exp()
    loss = F.cross_entropy(out, y) - torch.log(near / (near + far)).mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("kind", ["dense", "fedpara"])
@pytest.mark.parametrize(
    ("strategy", "gradients"), [(FedSAM(), of_sam), (Moon(), of_moon)], ids=["SAM", "MOON"]
)
def test_an_objective_of_ones_own_against_its_twin(tmp_path, strategy, gradients, kind):
    def build():
        return mlp(norm=False) if kind == "dense" else randomize(adapted(mlp(norm=False)))

    run = trainer(tmp_path / "own", strategy, build())
    history = run.train()
    expected, losses = by_hand(run, gradients, build)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=5e-6, rtol=1e-4, msg=name)
    assert [r.train_loss for r in history] == pytest.approx(losses, rel=1e-5)
    plain = trainer(tmp_path / "plain", FedAvg(), build())
    plain.train()
    assert any(
        (t - plain.model.state_dict()[n]).abs().max() > 1e-3
        for n, t in run.model.state_dict().items()
    )
    assert len({c for r in history for c in r.cohort}) < 4 * 3  # some came twice: MOON's z_before


def test_fedprox_by_its_objective_is_fedprox_by_its_gradient(tmp_path):
    """Also of factors, with a step's gradient in parts."""
    more = {"gradient_accumulation_steps": 2, "weight_decay": 0.01}
    runs = []
    for strategy in (Proximal(0.5), FedProx(0.5)):
        model = adapted(mlp(norm=False))
        runs.append(trainer(tmp_path / type(strategy).__name__, strategy, model, **more))
        runs[-1].train()
    expected = runs[1].model.state_dict()
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5, msg=name)


def test_what_an_objective_keeps_is_there_when_the_run_is_resumed(tmp_path):
    trainer(tmp_path / "cut", Moon(), save_every=2, num_rounds=2).train()
    again = trainer(tmp_path / "cut", Moon(), save_every=2)
    again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", Moon())
    whole.train()
    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in again.model.state_dict().items())
    assert again.client_state(0) is not None


def test_an_objective_of_ones_own_is_for_one_client_at_a_time(tmp_path):
    with pytest.raises(ArgumentsError, match="Moon cannot have jacobian_correction: its local"):
        trainer(tmp_path, Moon(), adapted(mlp(norm=False)), jacobian_correction=0.1)
    with pytest.raises(ArgumentsError, match="batched' is not possible: FedSAM has a local loss"):
        trainer(tmp_path, FedSAM(), engine="batched")
    run = trainer(tmp_path, FedSAM(), engine="auto")
    assert run._simulation.stacked is None
    assert trainer(tmp_path, LocalOnly(), engine="auto")._simulation.stacked is not None


def test_what_a_local_loss_returns_is_read_as_compute_losses(tmp_path):
    class Wrong(Strategy):
        def local_loss(self, model, batch, compute_loss, broadcast, kept):
            return compute_loss(model, batch).outputs

    with pytest.raises(ArgumentsError, match=r"^(client .*: )?Wrong.local_loss returned a loss of"):
        trainer(tmp_path, Wrong(), on_client_error="raise").train()


def test_a_forward_pass_at_the_broadcast_changes_nobody_elses_buffers(tmp_path):
    """Batch norm in training mode moves the statistics it is given; with μ = 0 it is FedAvg."""
    own = trainer(tmp_path / "own", Moon(mu=0.0), mlp())
    own.train()
    plain = trainer(tmp_path / "plain", FedAvg(), mlp(), engine="sequential")
    plain.train()
    expected = plain.model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in own.model.state_dict().items())
