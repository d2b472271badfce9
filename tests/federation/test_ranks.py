"""Clients of different ranks: each trains, gets and sends the first columns of the factors."""

import dataclasses
import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load, load_file
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ArgumentsError,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedParaConfig,
    FedProx,
    LocalOnly,
    ResumeError,
    Scaffold,
    communicated_state,
)
from fedpara_peft.comm.state import local_state
from fedpara_peft.federation.server.channel import Channel
from fedpara_peft.federation.server.mean import aggregate_from_name
from fedpara_peft.federation.server.ranks import ClientRanks, ranks_of
from fedpara_peft.federation.state import ClientUpdate, ServerState
from fedpara_peft.tuner.layer import factorized_weights
from fedpara_peft.tuner.ranks import Columns, factor_columns

R = 4
#: By client: of 1 and 3 columns, of half of them, and of all.
MIXED = [1, 0.5, 3, 4, 1.0]


class Net(nn.Module):
    """A convolution and two matrices, the second of which stays dense."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 16, 3, padding=1)
        self.hidden = nn.Linear(16 * 16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


def make(parameterization="fedpara", base_weight="replaced", r=R, **more):
    torch.manual_seed(0)
    config = FedParaConfig(
        r=r, parameterization=parameterization, base_weight=base_weight,
        target_modules=["conv", "hidden"], **more,
    )  # fmt: skip
    model = get_peft_model(Net(), config)
    with torch.no_grad():  # away from the start, at which a half may be zero
        for weight in factorized_weights(model):
            for half in weight.halves:
                for factor in half.tensors():
                    factor.add_(0.1 * torch.randn(factor.shape))
    return model


def data(clients=5, rows=24):
    x = torch.randn(clients, rows, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    return [TensorDataset(own, own.mean((2, 3))[:, :4].argmax(1)) for own in x]


def train(folder, model, ranks, strategy=None, callbacks=(), resume=None, clients=None, **more):
    settings = {
        "num_rounds": 3, "per_client_batch_size": 8, "learning_rate": 0.05, "momentum": 0.5,
        "disable_tqdm": True, "engine": "sequential",
    }  # fmt: skip
    args = FederatedArguments(str(folder), **{**settings, **more})
    trainer = FederatedTrainer(
        model, args, clients or data(), strategy=strategy, callbacks=callbacks, client_ranks=ranks
    )
    trainer.train(resume)
    return trainer


def everything(model):
    return {n: t.clone() for n, t in {**communicated_state(model), **local_state(model)}.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def cut(state, columns, r):
    """The slow twin of the cut: the first columns by ``narrow``."""
    found = {}
    for name, tensor in state.items():
        for dim in columns[name].dims if name in columns else ():
            tensor = tensor.narrow(dim, 0, r)
        found[name] = tensor
    return found


KINDS = [
    (parameterization, base)
    for parameterization in ("fedpara", "lowrank", "pfedpara")
    for base in ("replaced", "frozen")
]


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvgM(), FedProx(0.1), FedAdam()])
@pytest.mark.parametrize("ranks", [[R] * 5, [1.0] * 5, {}, lambda client: 100])
def test_ranks_that_leave_nothing_out_are_the_plain_run(tmp_path, strategy, ranks):
    plain = train(tmp_path / "plain", make("pfedpara"), None, strategy)
    ranked = train(tmp_path / "ranked", make("pfedpara"), ranks, strategy)
    assert equal(everything(plain.model), everything(ranked.model))
    assert list(plain.ledger.transfers()) == list(ranked.ledger.transfers())
    for client in range(5):
        assert equal(plain.client_state(client).local, ranked.client_state(client).local)


@pytest.mark.parametrize("nonlinearity", [None, "tanh"])
@pytest.mark.parametrize(("parameterization", "base_weight"), KINDS)
def test_clients_of_two_columns_are_a_run_of_an_adapter_of_rank_two(
    tmp_path, parameterization, base_weight, nonlinearity
):
    if parameterization == "lowrank" and nonlinearity:
        pytest.skip("lowrank has no nonlinearity")
    more = {"nonlinearity": nonlinearity}
    wide = make(parameterization, base_weight, **more)
    small = make(parameterization, base_weight, r=2, **more)
    columns, before = factor_columns(wide), everything(wide)
    rest = {n: t.clone() for n, t in wide.state_dict().items() if n not in columns}
    with torch.no_grad():
        small.load_state_dict(rest, strict=False)
        for name in everything(small):
            small.get_parameter(name).copy_(cut(before, columns, 2)[name])
    ranked = train(tmp_path / "ranked", wide, [2] * 5)
    plain = train(tmp_path / "plain", small, None)
    after = communicated_state(wide)
    for name, expected in communicated_state(small).items():
        torch.testing.assert_close(cut(after, columns, 2)[name], expected, rtol=1e-5, atol=1e-6)
        assert name not in columns or not torch.equal(cut(before, columns, 2)[name], expected)
    for name in after.keys() & columns.keys():  # what nobody has stays
        beyond = [t.clone() for t in (before[name], after[name])]
        for tensor in beyond:
            cut({name: tensor}, columns, 2)[name].zero_()
        assert torch.equal(*beyond)
        assert beyond[0].any()
    # Every byte is one of an adapter of that rank.
    assert list(ranked.ledger.transfers()) == list(plain.ledger.transfers())
    for client in range(5):
        if not (state := plain.client_state(client)):
            continue
        found = ranked.client_state(client).local
        for name, expected in state.local.items():
            part = cut(found, columns, 2)[name]
            torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)
            assert int(found[name].count_nonzero()) <= part.numel()


@pytest.mark.parametrize("optim", ["sgd", "adamw", "adagrad", "rmsprop", "muon", "adafactor"])
def test_no_optimizer_moves_what_a_client_has_not(tmp_path, optim):
    model = make()
    if optim == "muon":  # which is for matrices alone
        model = get_peft_model(
            nn.Sequential(nn.Flatten(), nn.Linear(96, 32, bias=False)),
            FedParaConfig(r=R, base_weight="replaced", target_modules=["1"]),
        )
    columns, before = factor_columns(model), everything(model)
    rate = {"learning_rate": 0.01, "momentum": 0.0, "weight_decay": 0.01}
    train(tmp_path, model, [2] * 5, optim=optim, optimizer_state="keep", **rate)
    after = communicated_state(model)
    for name in columns:
        moved = (after[name] != before[name]).nonzero()
        assert len(moved)
        assert all(int(moved[:, dim].max()) < 2 for dim in columns[name].dims)


@pytest.mark.parametrize("strategy", [FedAvgM(), FedAdam()])
def test_factors_that_take_turns_have_ranks_too(tmp_path, strategy):
    model, watch = make("fedpara"), Watch()
    columns = factor_columns(model)
    ranks = [numpy.int64(2), 1, 2, 1, numpy.float64(0.5)]
    train(tmp_path, model, ranks, strategy, [watch], num_rounds=8, factor_schedule="one_block")
    before, after = watch.seen[0][1]["params"], watch.seen[-1][1]["params"]
    for name in columns:
        moved = (before[name] != after[name]).nonzero()
        assert len(moved)
        assert all(int(moved[:, dim].max()) == 1 for dim in columns[name].dims)


class Restless(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(1e-3)


def test_an_optimizer_that_moves_what_a_client_has_not_is_an_error(tmp_path):
    args = FederatedArguments(str(tmp_path), num_rounds=1, disable_tqdm=True)
    trainer = FederatedTrainer(make(), args, data(), optimizer=Restless, client_ranks=[2] * 5)
    with pytest.raises(ArgumentsError, match="moved beyond its client's rank"):
        trainer.train()


# The mean.

WEIGHTS = st.floats(0.5, 50)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, R), min_size=1, max_size=6),
    weights=st.lists(WEIGHTS, min_size=6, max_size=6),
    seed=st.integers(0, 1000),
    name=st.sampled_from(["mean", "median", "trimmed_mean:0.3"]),
)
def test_every_column_is_averaged_over_the_clients_that_have_it(ranks, weights, seed, name):
    at = {
        dims: Columns(R, dims, ("layer", "default", "weight"), "replaced", True)
        for dims in [(1,), (0, 1)]
    }
    columns = {"x": at[1,], "t": at[0, 1]}
    shapes = {"x": (5, R), "t": (R, R, 3), "bias": (7,)}
    own = ClientRanks(columns, lambda client: ranks[client])
    g = torch.Generator().manual_seed(seed)
    full = [
        {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
        for _ in ranks
    ]
    levels = [own.level(client) for client in range(len(ranks))]
    like = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
    found = own.aggregate(like, levels, aggregate_from_name(name))
    for state, weight, level in zip(full, weights, levels, strict=False):
        found.add(own.cut(state, level), weight)
    result = found.result()
    assert {n: t.shape for n, t in result.items()} == {n: t.shape for n, t in like.items()}
    for tensor, shape in shapes.items():
        for entry in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(
            -1, len(shape)
        ):
            index = tuple(int(i) for i in entry)
            needed = (
                1 + max((index[d] for d in columns[tensor].dims), default=0)
                if (tensor in columns)
                else 0
            )
            who = [i for i, rank in enumerate(ranks) if rank >= needed]
            values = [float(full[i][tensor][index]) for i in who]
            share = {"median": 0.5, "trimmed_mean:0.3": 0.3}.get(name)
            if not who:
                expected = 0.0
            elif share is None:
                total = sum(weights[i] for i in who)
                expected = sum(weights[i] * v for i, v in zip(who, values, strict=True)) / total
            else:
                lost = min(int(share * len(who) + 1e-9), (len(who) - 1) // 2)
                kept = sorted(values)[lost : len(who) - lost]
                expected = sum(kept) / len(kept)
            assert abs(float(result[tensor][index]) - expected) < 1e-12


class Watch(FederatedCallback):
    """The server's state after every round, in whole."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, server):
        self.on_round_end(server, None)

    def on_round_end(self, server, report):
        groups = {"params": server.params, **server.optimizer}
        copy = {g: {n: t.clone() for n, t in s.items()} for g, s in groups.items()}
        self.seen.append((report, copy))


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvgM(), FedAdam()])
def test_a_column_that_nobody_sent_stays_whatever_the_server_optimizer(tmp_path, strategy):
    model, watch = make("lowrank", "frozen"), Watch()
    columns = factor_columns(model)
    train(
        tmp_path, model, [1, 2, 2, 4, 4], strategy, [watch],
        num_rounds=12, clients_per_round=1, seed=3,
    )  # fmt: skip
    tops = []
    for (_, before), (report, after) in zip(watch.seen, watch.seen[1:], strict=False):
        top = [1, 2, 2, 4, 4][report.cohort[0]]
        tops.append(top)
        for group in before:
            for name in before[group].keys() & columns.keys():
                moved = (before[group][name] != after[group][name]).nonzero()
                assert len(moved)
                assert all(int(moved[:, dim].max()) < top for dim in columns[name].dims)
    assert {1, 4} <= set(tops)
    assert any(a > b for a, b in itertools.pairwise(tops))  # momentum that had to rest


# What travels.


@pytest.mark.parametrize("codec", ["identity", "int8", "topk:0.5+int8"])
@pytest.mark.parametrize("feedback", [False, True])
def test_nothing_of_a_column_that_a_client_has_not_is_in_its_payloads(tmp_path, codec, feedback):
    model = make("pfedpara")
    args = FederatedArguments(str(tmp_path), uplink_codec=codec, error_feedback=feedback)
    columns = factor_columns(model)
    ranks = ranks_of(model, args, FedAvg(), MIXED, range(5))
    channel = Channel(args, FedAvg(), ranks)
    state = {n: torch.randn_like(t) for n, t in communicated_state(model).items()}
    other = {n: t.clone() for n, t in state.items()}
    for name in state.keys() & columns.keys():
        other[name] += 100
        cut(other, columns, 2)[name].copy_(cut(state, columns, 2)[name])
    assert ranks.level(1) == 0.5
    sent = [
        channel.downlink(ServerState(1, params), {}, level=0.5, encode=True)
        for params in (state, other)
    ]
    assert sent[0].payload.data == sent[1].payload.data
    inside = sorted(tuple(t.shape) for t in load(sent[0].payload.data).values())
    assert inside == sorted(tuple(t.shape) for t in cut(state, columns, 2).values())
    assert len(sent[0].size) == len(sent[0].payload)
    for name, tensor in sent[0].broadcast.params.items():
        assert torch.equal(cut({name: tensor}, columns, 2)[name], cut(state, columns, 2)[name])
        assert int(tensor.count_nonzero()) == cut(state, columns, 2)[name].numel()
    update = ClientUpdate(1, 3, ranks.only(state, 0.5), 1.0)
    upload = channel.uplink(update, {}, 1, encode=True)
    whole = Channel(args, FedAvg()).uplink(
        dataclasses.replace(update, update=state), {}, 1, encode=True
    )
    assert len(upload.payload) == len(channel.uplink_size(update))
    assert upload.payload.size.tensor_bytes < 0.8 * whole.payload.size.tensor_bytes
    for residue in (upload.residual, upload.received.update):
        for name, tensor in residue.items():
            kept = cut({name: tensor}, columns, 2)[name]
            assert tensor.shape == state[name].shape
            assert int(tensor.count_nonzero()) == int(kept.count_nonzero())
    assert bool(upload.residual) is (feedback and codec != "identity")


def test_the_bytes_of_a_mixed_run_are_those_of_its_clients_shares(tmp_path):
    model = make("fedpara", "frozen")
    columns = factor_columns(model)
    ledger = train(tmp_path, model, MIXED, num_rounds=2).ledger
    state = communicated_state(model)
    tensors = {
        client: sum(t.numel() * t.itemsize for t in cut(state, columns, r).values())
        for client, r in enumerate([1, 2, 3, 4, 4])
    }
    for transfer in ledger.transfers():
        assert transfer.tensor_bytes == tensors[transfer.client]


VARIANTS = [
    {},
    {"uplink_codec": "topk:0.3+int4", "error_feedback": True},
    {"uplink_codec": "int8", "downlink_codec": "int8"},
    {"factor_schedule": "one_block", "clients_per_round": 3},
    {"aggregation": "median", "clip_update_norm": 0.1},
    {"optim": "adamw", "optimizer_state": "keep", "momentum": 0.0, "learning_rate": 0.01},
    {"jacobian_correction": 0.1, "composed_weight_decay": 0.01},
    {"drop_out_probability": 0.3, "client_sampling": "weighted", "clients_per_round": 3},
]


@pytest.mark.parametrize("more", VARIANTS)
def test_a_resumed_run_of_mixed_ranks_is_the_uninterrupted_one(tmp_path, more):
    strategy = FedAvgM()
    straight = train(tmp_path / "one", make("pfedpara"), MIXED, strategy, num_rounds=4, **more)
    train(tmp_path / "two", make("pfedpara"), MIXED, strategy, num_rounds=2, save_every=2, **more)
    again = train(
        tmp_path / "two", make("pfedpara"), MIXED, strategy, resume=True, num_rounds=4, **more
    )
    assert equal(everything(straight.model), everything(again.model))
    columns = factor_columns(again.model)
    for client, r in enumerate([1, 2, 3, 4, 4]):
        kept = again.client_state(client)
        if kept is None:
            continue
        assert equal(kept.local, straight.client_state(client).local)
        for state in (kept.local, kept.residual, *kept.optimizer.values()):
            for name in state.keys() & columns.keys():
                part = cut(state, columns, r)[name] if state[name].dim() > 1 else state[name]
                assert int(state[name].count_nonzero()) == int(part.count_nonzero())


def test_a_checkpoint_of_other_ranks_is_refused(tmp_path):
    train(tmp_path, make(), MIXED, save_every=1)
    with pytest.raises(ResumeError, match="client_ranks"):
        train(tmp_path, make(), [1] * 5, resume=True, num_rounds=4)
    with pytest.raises(ResumeError, match="client_ranks"):
        train(tmp_path, make(), None, resume=True, num_rounds=4)


def test_a_clients_own_model_is_of_its_rank(tmp_path):
    model = make("pfedpara")
    trainer = train(tmp_path, model, MIXED)
    columns = factor_columns(model)
    weights = {}
    for client, r in enumerate([1, 2, 3, 4, 4]):
        own = trainer.client_model(client)
        state = everything(own)
        for name in columns:
            assert int(state[name].count_nonzero()) == cut(state, columns, r)[name].numel()
        weights[client] = own.base_model.model.hidden.get_delta_weight("default").detach()
        assert torch.linalg.matrix_rank(weights[client]) <= r * r + r
    assert torch.linalg.matrix_rank(weights[0]) == 2
    shared = communicated_state(model)
    assert all(t.count_nonzero() == t.numel() for n, t in shared.items() if n in columns)


def test_stacked_clients_of_mixed_ranks_are_those_alone(tmp_path):
    def linear():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 4))
        config = FedParaConfig(
            r=R, parameterization="pfedpara", base_weight="replaced", target_modules=["1"]
        )
        return get_peft_model(net, config)

    ranks, found = [1, 1, 3, 3, 4, 4, 2], {}
    for engine in ("sequential", "batched"):
        trainer = train(
            tmp_path / engine, linear(), ranks, engine=engine, clients=data(7), num_rounds=2
        )
        kept = {f"{c}.{n}": t for c in range(7) for n, t in trainer.client_state(c).local.items()}
        found[engine] = {**everything(trainer.model), **kept}
    for name, expected in found["sequential"].items():
        torch.testing.assert_close(found["batched"][name], expected, rtol=1e-4, atol=1e-5)


def test_local_only_trains_each_client_at_its_rank(tmp_path):
    trainer = train(tmp_path, make(), MIXED, LocalOnly())
    columns = factor_columns(trainer.model)
    for client, r in enumerate([1, 2, 3, 4, 4]):
        local = trainer.client_state(client).local
        for name in columns:
            assert int(local[name].count_nonzero()) == cut(local, columns, r)[name].numel()


# High columns live as long as somebody trains them.


def test_high_columns_do_not_vanish_in_a_hundred_rounds(tmp_path):
    """Four of six clients have one column, and zeros of theirs would count in no mean."""
    torch.manual_seed(0)
    base = nn.Linear(12, 12, bias=False)
    left, right = (torch.linalg.qr(torch.randn(12, R)).Q for _ in range(2))
    wanted = torch.tensor([4.0, 3.0, 2.0, 1.5])
    target = base.weight.detach() + left * wanted @ right.T
    config = FedParaConfig(r=R, parameterization="lowrank", target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config)
    clients = []
    for _ in range(6):
        x = torch.randn(40, 12)
        clients.append(TensorDataset(x, x @ target.T))
    args = FederatedArguments(
        str(tmp_path), num_rounds=100, per_client_batch_size=40, learning_rate=0.4,
        num_local_epochs=2, disable_tqdm=True, eval_every=0,
    )  # fmt: skip
    FederatedTrainer(
        model, args, clients, client_ranks=[1, 1, 1, 1, R, R],
        compute_loss=lambda m, batch: (m(batch[0]) - batch[1]).square().mean(),
    ).train()  # fmt: skip
    delta = model.base_model.model[0].get_delta_weight("default").detach()
    assert torch.all(torch.linalg.svdvals(delta)[:R] > 0.5 * wanted)


# What cannot be.


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 2], "2 ranks for 5 clients"),
        ({"nobody": 1}, "which are no clients"),
        ([0, 1, 1, 1, 1], "client 0: 0 is no rank"),
        ([1, True, 1, 1, 1], "client 1: True is no rank"),
        ([1, 1.5, 1, 1, 1], "client 1: 1.5 is no rank"),
        (lambda client: "two", "client 0: 'two' is no rank"),
    ],
)
def test_what_is_no_rank_is_refused(tmp_path, ranks, message):
    with pytest.raises(ArgumentsError, match=message):
        train(tmp_path, make(), ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": Scaffold()}, "Scaffold"),
        ({"strategy": FedDyn()}, "FedDyn"),
        ({"dp_noise_multiplier": 1.0, "clip_update_norm": 1.0}, "dp_noise_multiplier"),
        ({"report_averaging_bias": True}, "report_averaging_bias"),
        ({"downlink_codec": "int8", "error_feedback": True}, "downlink_codec='int8'"),
    ],
)
def test_what_ranks_cannot_have_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ArgumentsError, match=message):
        train(tmp_path, make(), MIXED, **change)


def test_models_that_cannot_have_ranks_are_refused_by_name(tmp_path):
    with pytest.raises(ArgumentsError, match="seeded"):
        train(tmp_path, make(base_weight="seeded"), MIXED)
    with pytest.raises(ArgumentsError, match="without trainable FedPara adapters"):
        train(tmp_path, Net(), MIXED)
    half_frozen = make()
    next(p for n, p in half_frozen.named_parameters() if "fedpara_w1_y" in n).requires_grad_(False)
    with pytest.raises(ArgumentsError, match="factors that do not train"):
        train(tmp_path, half_frozen, MIXED)


def test_a_mixed_run_writes_what_a_run_writes(tmp_path):
    trainer = train(tmp_path, make("lowrank", "frozen"), MIXED, save_every=3)
    saved = load_file(tmp_path / "checkpoint-3" / "server.safetensors")
    for name, tensor in communicated_state(trainer.model).items():
        assert torch.equal(saved[f"params/{name}"], tensor)
