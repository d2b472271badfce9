"""Every strategy with codecs, clipping and local optimizers, against whole runs written by hand.

In float64, clients with torch's own SGD. What client and server keep of each other must agree:
SCAFFOLD's c is the mean of all c_i, FedDyn's h of all λ_i, whatever happened on the way.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedProx,
    FedYogi,
    Scaffold,
)
from fedpara_peft.comm.codecs import codec_from_name
from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.federation.client.stack.engine import BatchedTrainer
from fedpara_peft.federation.random import torch_generator
from fedpara_peft.federation.server.sampling import drop_outs, sample_cohort

SIZES = (24, 24, 24, 20, 20)
OPTIMIZERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.8, "weight_decay": 0.05},
    "momentum and clipped gradients": {"momentum": 0.8, "max_grad_norm": 0.6},
}
CODECS = {
    "exact": {},
    "int4": {"uplink_codec": "int4"},
    "topk": {"uplink_codec": "topk:0.3+int8", "error_feedback": True},
}


class Net(nn.Module):
    """Two layers, and an expert that is asked in the last step of some clients alone."""

    def __init__(self, gated):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.expert = nn.Linear(6, 3) if gated else None

    def forward(self, x):
        found = self.last(torch.tanh(self.first(x)))
        return found + self.expert(x) if self.expert is not None and len(x) % 8 else found


def model(gated=False):
    torch.manual_seed(0)
    return Net(gated).double()


def clients():
    generator = torch.Generator().manual_seed(1)
    found = []
    for i, size in enumerate(SIZES):
        x = torch.randn(size, 6, generator=generator).double() + 0.3 * i
        found.append(TensorDataset(x, (x[:, :3] + 0.2 * i).argmax(1)))
    return found


class Last(FederatedCallback):
    def on_round_end(self, server, report):
        self.server = server


def run(folder, strategy, gated=False, **settings):
    last = Last()
    args = FederatedArguments(str(folder), disable_tqdm=True, eval_every=0, **settings)
    trainer = FederatedTrainer(model(gated), args, clients(), strategy=strategy, callbacks=[last])
    trainer.train()
    return trainer, last.server


# The same, written out.


def local_steps(net, start, data, args, number, client, correct):
    """A client's turn with torch's optimizer; its weights and what its gradients weigh in all."""
    net.load_state_dict(start)
    named = dict(net.named_parameters())
    optimizer = torch.optim.SGD(
        net.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay
    )
    scales = []
    for epoch in range(args.num_local_epochs):
        generator = torch_generator(args.seed, number, client, f"batches {epoch}")
        order = torch.randperm(len(data), generator=generator)
        for part in order.split(args.per_client_batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                net(data.tensors[0][part]), data.tensors[1][part]
            ).backward()
            for name, p in named.items():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad += correct(name, p.detach())
            scales.append(1.0)
            if args.max_grad_norm is not None:
                norm = float(nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm))
                scales[-1] = min(1.0, args.max_grad_norm / (norm + 1e-6))
            optimizer.step()
    # Step k's gradient acts on all steps from k on, damped by β each time.
    steps = len(scales)
    weight = sum(
        s * sum(args.momentum ** (j - k) for j in range(k, steps)) for k, s in enumerate(scales)
    )
    return {n: p.detach() for n, p in named.items()}, weight


def clipped(state, bound):
    norm = sum(float(t.square().sum()) for t in state.values()) ** 0.5
    return (
        state if bound is None or norm <= bound else {n: t * bound / norm for n, t in state.items()}
    )


def mean(states, weights):
    return {
        n: sum(p * s[n] for p, s in zip(weights, states, strict=True)) / sum(weights)
        for n in states[0]
    }


def corrected(strategy, w, own, control):
    if isinstance(strategy, FedProx):
        return lambda n, y: strategy.mu * (y - w[n])
    if isinstance(strategy, FedDyn):
        return lambda n, y: strategy.dyn_alpha * (y - w[n]) - own[n]
    if isinstance(strategy, Scaffold):
        return lambda n, y: control[n] - own[n]
    return lambda n, y: 0.0


def server_step(strategy, w, mean, kept, share, change):
    """The next weights; ``kept`` is changed in place."""
    for n in w:
        m = mean[n]
        if isinstance(strategy, Scaffold):
            kept["control"][n] = kept["control"][n] + share * change[n]
            m = strategy.server_learning_rate * m
        elif isinstance(strategy, FedDyn):
            kept["h"][n] = kept["h"][n] - strategy.dyn_alpha * share * m
            m = m - kept["h"][n] / strategy.dyn_alpha
        elif isinstance(strategy, FedAvgM):
            kept["v"][n] = strategy.server_momentum * kept["v"][n] + m
            m = strategy.server_learning_rate * kept["v"][n]
        elif isinstance(strategy, FedAdam | FedYogi | FedAdagrad):
            first = strategy.beta1 * kept["m"][n] + (1 - strategy.beta1) * m
            second, square = kept["s"][n] + strategy.tau**2, m**2
            if isinstance(strategy, FedAdam):
                second = strategy.beta2 * second + (1 - strategy.beta2) * square
            elif isinstance(strategy, FedYogi):
                second = second - (1 - strategy.beta2) * square * torch.sign(second - square)
            else:
                second = second + square
            kept["m"][n], kept["s"][n] = first, second - strategy.tau**2
            m = strategy.server_learning_rate * first / (second.sqrt() + strategy.tau)
        w = {**w, n: w[n] + m}
    return w


def by_hand(strategy, args, gated=False):
    data = clients()
    w = {n: p.detach().clone() for n, p in model(gated).named_parameters()}
    zeros = {n: torch.zeros_like(t) for n, t in w.items()}
    kept = {name: dict(zeros) for name in ("control", "h", "v", "m", "s")}
    own = {i: dict(zeros) for i in range(len(data))}
    residual = {i: dict(zeros) for i in range(len(data))}
    alike = isinstance(strategy, Scaffold | FedDyn)
    for number in range(args.num_rounds):
        cohort = sample_cohort(SIZES, args.cohort_size(len(data)), args.seed, number)
        gone = drop_outs(cohort, args.drop_out_probability, args.seed, number)
        moves, changes, weights = [], [], []
        for i in (c for c in cohort if c not in gone):
            control = kept["control"]
            correct = corrected(strategy, w, own[i], control)
            y, weight = local_steps(model(gated), w, data[i], args, number, i, correct)
            delta = {n: y[n] - w[n] for n in w}
            sent = {n: d + residual[i][n] for n, d in delta.items()}
            if isinstance(strategy, Scaffold):
                rate = weight * args.learning_rate
                sent |= {f"control/{n}": -delta[n] / rate - control[n] for n in w}
            form = Format(schema_of(sent), codec_from_name(args.uplink_codec))
            generator = torch_generator(args.seed, number, i, "uplink codec")
            found = form.decode(form.encode(sent, number, generator).data, number)
            if args.error_feedback:
                residual[i] = {n: sent[n] - found[n] for n in w}
            move = clipped({n: found[n] for n in w}, args.clip_update_norm)
            if isinstance(strategy, Scaffold):
                change = {n: found[f"control/{n}"] for n in w}
                changes.append(clipped(change, args.clip_update_norm))
                own[i] = {n: c + changes[-1][n] for n, c in own[i].items()}
            if isinstance(strategy, FedDyn):
                own[i] = {n: c - strategy.dyn_alpha * move[n] for n, c in own[i].items()}
            moves.append(move)
            weights.append(1.0 if alike else SIZES[i])
        if not moves:
            continue

        share = len(moves) / len(data)
        change = mean(changes, weights) if changes else None
        w = server_step(strategy, w, mean(moves, weights), kept, share, change)
    return w, own, residual, kept


def assert_twin(folder, strategy, settings, gated=False):
    """Both engines against the run written out."""
    settings = {
        "num_rounds": 4, "clients_per_round": 4, "drop_out_probability": 0.2, "seed": 3,
        "per_client_batch_size": 8, "num_local_epochs": 2, "learning_rate": 0.05, **settings,
    }  # fmt: skip
    w, own, residual, kept = by_hand(strategy, FederatedArguments(str(folder), **settings), gated)
    near = {"atol": 1e-10, "rtol": 1e-8}
    for engine in ("sequential", "batched"):
        trainer, server = run(folder / engine, strategy, gated, engine=engine, **settings)
        for n, p in trainer.model.named_parameters():
            torch.testing.assert_close(p.detach(), w[n], **near)
        group, total = {Scaffold: ("control", "control"), FedDyn: ("dual", "h")}.get(
            type(strategy), (None, None)
        )
        for i in range(len(SIZES)):
            state = trainer.client_state(i)
            for n in w if state else ():
                if group:
                    torch.testing.assert_close(state.strategy[group][n], own[i][n], **near)
                if settings.get("error_feedback"):
                    torch.testing.assert_close(state.residual[n], residual[i][n], **near)
        for n in w if group else ():
            torch.testing.assert_close(server.optimizer[total][n], kept[total][n], **near)
            agreed = sum(own[i][n] for i in own) / len(own)
            torch.testing.assert_close(server.optimizer[total][n], agreed, **near)


@pytest.fixture
def stacks(monkeypatch):
    """That the batched engine did train stacks."""
    sizes, train = [], BatchedTrainer.train

    def watched(self, clients, *args):
        sizes.append(len(clients))
        return train(self, clients, *args)

    monkeypatch.setattr(BatchedTrainer, "train", watched)
    yield sizes
    assert max(sizes) > 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("strategy", [Scaffold(0.9), FedDyn(0.3)], ids=lambda s: type(s).__name__)
def test_client_and_server_agree_with_codecs_clipping_and_momentum(
    tmp_path, stacks, strategy, codec, optimizer
):
    for bound in (None, 0.2):
        settings = {**CODECS[codec], **OPTIMIZERS[optimizer], "clip_update_norm": bound}
        assert_twin(tmp_path / str(bound), strategy, settings)


@pytest.mark.parametrize("strategy", [Scaffold(0.9), FedDyn(0.3), FedProx(0.4)])
@pytest.mark.parametrize("optimizer", ["plain", "momentum and decay"])
def test_an_expert_that_a_client_never_asks_is_corrected_all_the_same(
    tmp_path, stacks, strategy, optimizer
):
    assert_twin(tmp_path, strategy, OPTIMIZERS[optimizer], gated=True)


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), FedProx(0.4), FedAvgM(), FedAdam(), FedYogi(), FedAdagrad()],
    ids=lambda s: type(s).__name__,
)
def test_the_other_strategies_with_the_same(tmp_path, stacks, strategy):
    for number, (codec, optimizer) in enumerate(itertools.product(CODECS, OPTIMIZERS)):
        settings = {**CODECS[codec], **OPTIMIZERS[optimizer]}
        settings["clip_update_norm"] = (None, 0.2)[number % 2]
        if number % 3 == 0 or optimizer == "momentum and decay":
            assert_twin(tmp_path / str(number), strategy, settings)
