"""``per_client_max_steps``: as many local steps as one asks for, however much data a client has."""

import itertools

import pytest
import torch
from tests.federation.runs import FedNova
from tests.federation.test_trainer import arguments, toy
from tests.zoo import mlp
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fedpara_peft import FedAvg, FederatedTrainer, ResumeError, Scaffold
from fedpara_peft.federation.random import torch_generator

SIZES = (40, 16, 3, 61)  # 5, 2, 1 and 8 batches of 8 rows


def rows(examples):
    x, y = toy(examples).tensors
    return TensorDataset(x.double(), y)


def clients(sizes=SIZES):
    ends = list(itertools.accumulate(sizes, initial=0))
    return [Subset(rows(ends[-1]), range(a, b)) for a, b in itertools.pairwise(ends)]


def trainer(folder, strategy=None, data=None, **changes):
    settings = {
        "num_rounds": 3, "clients_per_round": 4, "per_client_batch_size": 8,
        "learning_rate": 0.05, **changes,
    }  # fmt: skip
    return FederatedTrainer(
        mlp(norm=False).double(), arguments(folder, **settings), data or clients(),
        strategy=strategy,
    )  # fmt: skip


def steps_by_hand(model, data, steps, number, client, args, correct=None):
    """So many steps of SGD, epoch after epoch, until they are made; their number."""
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, args.momentum)
    made = 0
    for epoch in itertools.count():
        order = torch.randperm(
            len(data), generator=torch_generator(args.seed, number, client, f"batches {epoch}")
        )
        for part in order.split(args.per_client_batch_size * args.gradient_accumulation_steps):
            if made == steps:
                return made
            x, y = (torch.stack(c) for c in zip(*[data[j] for j in part.tolist()], strict=True))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for name, p in model.named_parameters():
                if correct is not None:
                    p.grad += correct[name]
            optimizer.step()
            made += 1


def fedavg_by_hand(run, data, steps):
    args, model = run.args, mlp(norm=False).double()
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    total = sum(map(len, data))
    for number in range(args.num_rounds):
        means = {n: torch.zeros_like(t) for n, t in state.items()}
        for i, own in enumerate(data):
            model.load_state_dict(state)
            steps_by_hand(model, own, steps, number, i, args)
            for n, p in model.named_parameters():
                means[n] += p.detach() * len(own) / total
        state = means
    return state


def close(model, state):
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), state[name], atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.parametrize("steps", [1, 3, 11])
@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_so_many_steps_are_the_loop_written_out(tmp_path, steps, engine):
    """Fewer than an epoch has, and more; three epochs asked for beside them do not count."""
    data = clients((24, 24, 24)) if engine == "batched" else clients()
    settings = {"num_local_epochs": 3, "engine": engine, "momentum": 0.5}
    run = trainer(
        tmp_path, data=data, per_client_max_steps=steps, clients_per_round=len(data), **settings
    )
    run.train()
    close(run.model, fedavg_by_hand(run, data, steps))


def test_a_step_of_accumulated_batches_is_one_step(tmp_path):
    """An epoch's last step may have fewer batches: two, one; two, one; …"""
    data = clients((24, 24))
    run = trainer(
        tmp_path, data=data, per_client_max_steps=5, clients_per_round=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    run.train()
    close(run.model, fedavg_by_hand(run, data, 5))


@pytest.mark.parametrize("off", [0, -1])
def test_up_to_zero_epochs_count(tmp_path, off):
    run = trainer(tmp_path / "off", per_client_max_steps=off, num_local_epochs=2)
    usual = trainer(tmp_path / "usual", num_local_epochs=2)
    run.train()
    usual.train()
    for a, b in zip(run.model.parameters(), usual.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize("steps", [2, 5])
def test_scaffold_divides_by_the_steps_that_were_made(tmp_path, engine, steps):
    """Option II of arXiv:1910.06378: cᵢ⁺ = cᵢ - c + (x - yᵢ) / (K η), written out over rounds."""
    data = clients((24, 24, 24)) if engine == "batched" else clients()
    run = trainer(
        tmp_path, Scaffold(), data, per_client_max_steps=steps, engine=engine,
        clients_per_round=len(data),
    )  # fmt: skip
    run.train()
    args, model = run.args, mlp(norm=False).double()
    x = {n: p.detach().clone() for n, p in model.named_parameters()}
    c = {n: torch.zeros_like(t) for n, t in x.items()}
    own = [dict(c) for _ in data]
    for number in range(args.num_rounds):
        moves, changes = [], []
        for i, dataset in enumerate(data):
            model.load_state_dict(x)
            correct = {n: c[n] - own[i][n] for n in x}
            K = steps_by_hand(model, dataset, steps, number, i, args, correct)
            y = {n: p.detach().clone() for n, p in model.named_parameters()}
            new = {n: own[i][n] - c[n] + (x[n] - y[n]) / (K * args.learning_rate) for n in x}
            moves.append({n: y[n] - x[n] for n in x})
            changes.append({n: new[n] - own[i][n] for n in x})
            own[i] = new
        x = {n: t + sum(m[n] for m in moves) / len(data) for n, t in x.items()}
        c = {n: t + sum(m[n] for m in changes) / len(data) for n, t in c.items()}
    close(run.model, x)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fednova_of_equally_many_steps_is_fedavg_with_an_epochs_it_is_not(tmp_path, momentum):
    """(Σ pᵢ τᵢ) Σ pᵢ Δᵢ / τᵢ is Σ pᵢ Δᵢ where all τ are alike, whatever data clients have."""

    def both(folder, **settings):
        found = [
            trainer(folder / type(s).__name__, s, momentum=momentum, **settings)
            for s in (FedNova(), FedAvg())
        ]
        for run in found:
            run.train()
        pairs = zip(*(run.model.state_dict().values() for run in found), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    assert both(tmp_path / "steps", per_client_max_steps=3) < 1e-12
    assert both(tmp_path / "epochs", num_local_epochs=1) > 1e-4


def test_a_resumed_run_makes_as_many_steps(tmp_path):
    trainer(tmp_path, per_client_max_steps=2, save_every=1).train()
    with pytest.raises(ResumeError, match="per_client_max_steps: 2 then, 3 now"):
        trainer(tmp_path, per_client_max_steps=3, num_rounds=4).train(resume_from_checkpoint=True)


def test_where_no_label_counts_a_client_does_not_train_for_ever(tmp_path):
    x, y = rows(16).tensors
    run = trainer(
        tmp_path, data=[TensorDataset(x, torch.full_like(y, -100)), *clients((8, 8))],
        per_client_max_steps=4, clients_per_round=3, num_rounds=1,
    )  # fmt: skip
    (report,) = run.train()
    assert report.refused == ((0, "failed"),)
