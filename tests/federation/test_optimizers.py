"""Clients' optimizers and rates, against loops with torch's own classes in float64."""

import functools
import math

import pytest
import torch
from tests.federation.test_batched import stacked  # noqa: F401
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp, randomize
from torch import nn
from torch.utils.data import TensorDataset
from transformers import HfArgumentParser

from fedpara_peft import (
    ArgumentsError,
    FedDyn,
    FederatedArguments,
    FederatedTrainer,
    FedProx,
    LocalOnly,
    ResumeError,
    Scaffold,
    partition,
)
from fedpara_peft.federation.client.optimizer import optimizers_by_name
from fedpara_peft.federation.random import torch_generator
from fedpara_peft.federation.server.sampling import sample_cohort

pytestmark = pytest.mark.filterwarnings("error")


def build(parameterization="fedpara"):
    torch.manual_seed(0)
    model = adapted(mlp(norm=False), parameterization=parameterization)
    return randomize(model).double()


def clients(count=3, size=20):
    x, y = toy(count * size).tensors
    return list(partition(TensorDataset(x.double(), y), "iid", count))


def args_of(folder, **changes):
    defaults = {"num_rounds": 3, "learning_rate": 0.02, "clients_per_round": None}
    return arguments(folder, **{**defaults, **changes})


def trained(folder, data, strategy=None, optimizer=None, **changes):
    model = build()
    args = args_of(folder, **changes)
    trainer = FederatedTrainer(model, args, data, strategy=strategy, optimizer=optimizer)
    trainer.train()
    return trainer


# Written out.


def turn(model, optimizers, args, data, number, client):
    for epoch in range(args.num_local_epochs):
        order = torch.randperm(
            len(data), generator=torch_generator(args.seed, number, client, f"batches {epoch}")
        )
        for part in order.split(args.per_client_batch_size):
            rows = [data[i] for i in part.tolist()]
            x, y = (torch.stack(column) for column in zip(*rows, strict=True))
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def set_to(model, state):
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(state[name])


def state_of(model):
    return {n: p.detach().clone() for n, p in trainable(model).items()}


def by_hand(args, data, make, rate=lambda number: 0.02):
    """FedAvg over clients of one size, each with a new optimizer in every round."""
    model = build()
    w = state_of(model)
    for number in range(args.num_rounds):
        ended = []
        for i in sample_cohort([len(d) for d in data], args.cohort_size(len(data)), 0, number):
            set_to(model, w)
            turn(model, make(trainable(model), rate(number)), args, data[i], number, i)
            ended.append(state_of(model))
        w = {n: sum(e[n] for e in ended) / len(ended) for n in w}
    return w


def assert_near(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, atol=1e-11, rtol=1e-9, msg=name)


def plain(kind, **options):
    return lambda parameters, rate: [kind(list(parameters.values()), lr=rate, **options)]


def muon(parameters, rate):
    matrices = [p for p in parameters.values() if p.ndim == 2]
    others = [p for p in parameters.values() if p.ndim != 2]
    assert matrices
    assert others
    return [
        torch.optim.Muon(
            matrices, lr=rate, weight_decay=0.01, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01),
    ]


O = torch.optim  # noqa: E741
#: What stands in the arguments or goes to the trainer, and the same as torch has it.
CASES = {
    "sgd": ({"momentum": 0.9, "weight_decay": 0.1},
            plain(O.SGD, momentum=0.9, weight_decay=0.1)),
    "sgd, Nesterov": ({"momentum": 0.9, "optim_args": "nesterov=True"},
                      plain(O.SGD, momentum=0.9, nesterov=True)),
    "sgd, damped": ({"momentum": 0.9, "optim_args": {"dampening": 0.5}},
                    plain(O.SGD, momentum=0.9, dampening=0.5)),
    "adam": ({"optim": "adam", "max_grad_norm": 0.5}, plain(O.Adam)),
    "adam, decayed": ({"optim": "Adam", "weight_decay": 0.1}, plain(O.Adam, weight_decay=0.1)),
    "adamw": ({"optim": "adamw", "weight_decay": 0.1,
               "optim_args": '{"betas": [0.8, 0.9], "eps": 1e-6}'},
              plain(O.AdamW, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)),
    "adamw without decay": ({"optim": "adamw"}, plain(O.AdamW, weight_decay=0.0)),
    "adafactor": ({"optim": "adafactor", "optim_args": "d=1.5"}, plain(O.Adafactor, d=1.5)),
    "muon": ({"optim": "muon", "momentum": 0.9, "weight_decay": 0.01}, muon),
    "rmsprop": ({"optim": "rmsprop", "momentum": 0.5}, plain(O.RMSprop, momentum=0.5)),
    "a class": ({"optimizer": O.AdamW}, plain(O.AdamW, weight_decay=0.0)),
    "a partial": ({"optimizer": functools.partial(O.AdamW, weight_decay=0.2, amsgrad=True)},
                  plain(O.AdamW, weight_decay=0.2, amsgrad=True)),
    "a function": ({"optimizer": lambda groups: O.NAdam(groups, momentum_decay=0.1)},
                   plain(O.NAdam, momentum_decay=0.1)),
}  # fmt: skip
MUON = hasattr(O, "Muon")  # it is new in torch 2.9
if not MUON:
    del CASES["muon"]
STACKED = [n for n in CASES if n.startswith(("sgd", "adam", "a class", "a partial"))]
PAIRS = [(n, "sequential") for n in CASES] + [(n, "batched") for n in STACKED]


@pytest.mark.parametrize(("case", "engine"), PAIRS)
def test_the_clients_optimizer_is_torchs(tmp_path, case, engine, stacked):  # noqa: F811
    settings, make = CASES[case]
    trainer = trained(tmp_path, clients(), engine=engine, **settings)
    expected = by_hand(trainer.args, clients(), make)
    assert_near(trainable(trainer.model), expected)
    start = state_of(build())
    assert all(not torch.equal(expected[n], start[n]) for n in start)
    assert bool(stacked) == (engine == "batched")


@pytest.mark.parametrize(("case", "engine"), PAIRS)
def test_a_kept_state_is_one_long_run_of_torchs(tmp_path, case, engine, stacked):  # noqa: F811
    """Every client alone, for as long as the run is, with one optimizer."""
    settings, make = CASES[case]
    data = clients()
    trainer = trained(
        tmp_path, data, LocalOnly(), engine=engine, optimizer_state="keep", **settings
    )
    anew = trained(tmp_path / "anew", data, LocalOnly(), **settings)
    for i, own in enumerate(data):
        model = build()
        optimizers = make(trainable(model), 0.02)
        for number in range(3):
            turn(model, optimizers, trainer.args, own, number, i)
        expected = state_of(model)
        assert_near(trainer.client_state(i).local, expected)
        again = anew.client_state(i).local
        assert any((again[n] - v).abs().max() > 1e-6 for n, v in expected.items())
    assert bool(stacked) == (engine == "batched")


def test_a_kept_state_with_one_client_of_a_federation_is_one_long_run(tmp_path):
    data = clients(1, 40)
    trainer = trained(
        tmp_path, data, optim="adamw", optimizer_state="keep", num_rounds=5,
        lr_scheduler_type="constant",
    )  # fmt: skip
    model = build()
    optimizers = plain(O.AdamW, weight_decay=0.0)(trainable(model), 0.02)
    for number in range(5):
        turn(model, optimizers, trainer.args, data[0], number, 0)
    assert_near(trainable(trainer.model), state_of(model))
    kept = trainer.client_state(0).optimizer
    assert kept.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert kept["exp_avg"].keys() == trainable(model).keys()
    assert {float(t) for t in kept["step"].values()} == {5 * 2 * 5.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw", "weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "optim_args": "dampening=0.5"},
    ],
    ids=["adamw", "sgd", "damped"],
)
def test_clients_that_trained_differently_often_are_stacked_with_their_like(
    tmp_path,
    stacked,  # noqa: F811
    settings,
):
    settings = {**settings, "optimizer_state": "keep", "clients_per_round": 5, "num_rounds": 6}
    one = trained(tmp_path / "a", clients(8), engine="sequential", **settings)
    other = trained(tmp_path / "b", clients(8), engine="batched", **settings)
    assert_near(trainable(other.model), state_of(one.model))
    assert {2, 3} & set(stacked)  # a cohort of 5, in parts
    for i in range(8):
        a, b = (t.client_state(i).optimizer for t in (one, other))
        assert a.keys() == b.keys() != set()
        for part in a:
            assert_near(b[part], a[part])


def test_factors_that_rest_keep_their_optimizers_state(tmp_path):
    settings = {"optim": "adamw", "optimizer_state": "keep", "factor_schedule": "one_block"}
    one = trained(tmp_path / "a", clients(), num_rounds=5, **settings)
    steps = {n: float(t) for n, t in one.client_state(0).optimizer["step"].items()}
    a_round = 2 * 3  # epochs, batches
    # Four factors a weight take turns: of five rounds the first has two.
    assert {v for n, v in steps.items() if "fedpara_" in n} == {a_round, 2 * a_round}
    assert {v for n, v in steps.items() if "fedpara_" not in n} == {5 * a_round}


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 0.05},
        {"optim": "adamw"},
        {"momentum": 0.9, "optim_args": "dampening=0.5"},
    ],
    ids=["sgd", "adamw", "damped"],
)
@pytest.mark.parametrize("state", ["reset", "keep"])
def test_a_batch_in_which_no_label_counts_is_no_step(tmp_path, settings, state):
    """Of one client of a stack, while the others make it."""
    data = []
    for i, own in enumerate(clients()):
        rows = [own[j] for j in range(len(own))]
        x, y = (torch.stack(column) for column in zip(*rows, strict=True))
        y[i * 7 :] = -100 if i else y[i * 7 :]
        data.append(TensorDataset(x, y))
    settings = {**settings, "per_client_batch_size": 5, "optimizer_state": state}
    one = trained(tmp_path / "a", data, FedProx(0.2), engine="sequential", **settings)
    other = trained(tmp_path / "b", data, FedProx(0.2), engine="batched", **settings)
    assert_near(trainable(other.model), state_of(one.model))


class Sums(nn.Module):
    """Two parameters get one gradient, and one gets ones alone, expanded from a number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 4)
        self.p, self.q, self.r = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x):
        return self.layer(x) + (self.p + self.q)


@pytest.mark.parametrize("strategy", [FedProx(0.5), FedDyn(0.3), Scaffold()])
def test_gradients_that_share_memory_are_corrected_each_by_itself(tmp_path, strategy):
    models = []
    for engine in ("sequential", "batched"):
        model = Sums().double()
        args = args_of(tmp_path / engine, engine=engine, max_grad_norm=0.5, momentum=0.5)
        FederatedTrainer(model, args, clients(), strategy=strategy, compute_loss=sums_loss).train()
        models.append(model)
    assert_near(trainable(models[1]), state_of(models[0]))


def sums_loss(model, batch):
    out = model(batch[0])
    return nn.functional.cross_entropy(out, batch[1]) + 0.1 * model.r.sum() + 0.1 * out.mean()


# Rates.


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_factors_have_a_rate_of_their_own(tmp_path, optim, engine):
    def make(parameters, rate):
        factors = [p for n, p in parameters.items() if "fedpara_" in n]
        others = [p for n, p in parameters.items() if "fedpara_" not in n]
        assert factors
        assert others
        kind = O.SGD if optim == "sgd" else functools.partial(O.AdamW, weight_decay=0.0)
        return [kind([{"params": others, "lr": rate}, {"params": factors, "lr": 0.5 * rate}])]

    settings = {"optim": optim, "factor_learning_rate": 0.01, "learning_rate_decay": 0.7}
    trainer = trained(tmp_path, clients(), engine=engine, **settings)
    expected = by_hand(trainer.args, clients(), make, lambda number: 0.02 * 0.7**number)
    assert_near(trainable(trainer.model), expected)


ROUNDS = 8
COURSES = {
    "constant": ({}, [1] * 8),
    "warm-up": ({"warmup_rounds": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
    "ratio": ({"warmup_ratio": 0.3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
    "linear": ({"lr_scheduler_type": "linear"}, [1 - t / 8 for t in range(8)]),
    "linear, warm-up": ({"lr_scheduler_type": "linear", "warmup_rounds": 3},
                        [1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
    "cosine": ({"lr_scheduler_type": "cosine"},
               [math.cos(math.pi * t / 16) ** 2 for t in range(8)]),
    "cosine, decay": ({"lr_scheduler_type": "cosine", "learning_rate_decay": 0.5},
                      [math.cos(math.pi * t / 16) ** 2 / 2**t for t in range(8)]),
}  # fmt: skip


@pytest.mark.parametrize("course", COURSES)
def test_the_rate_follows_from_the_round_alone(tmp_path, course):
    settings, shares = COURSES[course]
    settings = {"num_rounds": ROUNDS, "num_local_epochs": 1, **settings}
    args = args_of(tmp_path, factor_learning_rate=0.005, **settings)
    assert all(share > 0 for share in shares)
    for number, share in enumerate(shares):
        assert args.learning_rate_at(number) == pytest.approx(0.02 * share, rel=1e-12)
        assert args.learning_rate_at(number, factors=True) == pytest.approx(0.005 * share)
    trainer = trained(tmp_path, clients(), **settings)
    expected = by_hand(trainer.args, clients(), plain(O.SGD), lambda number: 0.02 * shares[number])
    assert_near(trainable(trainer.model), expected)


def test_a_course_over_the_rounds_is_resumed_with_as_many(tmp_path):
    settings = {"num_rounds": 2, "save_every": 1, "learning_rate": 0.02, "clients_per_round": None}
    for more, depends in (({}, False), ({"warmup_rounds": 1}, False), ({"warmup_ratio": 0.5}, True),
                          ({"lr_scheduler_type": "cosine"}, True)):  # fmt: skip
        folder = tmp_path / str(more)

        def run(rounds, folder=folder, more=more):
            args = arguments(folder, **{**settings, "num_rounds": rounds}, **more)
            return FederatedTrainer(build(), args, clients()).train(resume_from_checkpoint=True)

        run(2)
        if depends:
            with pytest.raises(ResumeError, match="rounds of the schedule: 2 then, 4 now"):
                run(4)
        else:
            assert len(run(4)) == 4


# What cannot be.


def same_object():
    made = []

    def factory(groups):
        made.append(O.SGD(groups))
        return made[0]

    return factory


class Lists(O.SGD):
    """Keeps a list."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = [1.0]


class Counts(O.SGD):
    """Keeps a number of the group, and one of every parameter."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1


class HoldsTheModel(O.SGD):
    """Keeps the parameter itself, under two names."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(last=p, again=p)


class Sharpness(O.SGD):
    def step(self, closure):
        raise AssertionError


class CountsInGroup(O.SGD):
    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


REFUSED = [
    ({"optim": "adamv"}, "optim must be one of .*adamw.*, got 'adamv'"),
    ({"optim": "lbfgs"}, "optim must be one of"),
    ({"optim": "sparseadam"}, "optim must be one of"),
    ({"optim": "adamw", "momentum": 0.9}, "AdamW has no momentum, got momentum=0.9"),
    ({"optim": "rprop", "weight_decay": 0.1}, "Rprop has no weight_decay, got weight_decay=0.1"),
    ({"optim": "adamw", "optim_args": "beta=1"}, "AdamW cannot be made: .*'beta'"),
    ({"optim": "adamw", "optim_args": "betas=(2, 0)"}, "AdamW cannot be made: Invalid beta"),
    ({"optim_args": "lr=0.1"}, "optim_args has 'lr': give it as learning_rate"),
    ({"optim_args": {"momentum": 0.1}}, "optim_args has 'momentum': give it as momentum"),
    ({"optim_args": "betas"}, "cannot be read"),
    ({"optim_args": "betas=f(1)"}, "cannot be read"),
    ({"optim_args": "{'a': 1"}, "cannot be read"),
    ({"optim_args": ["nesterov"]}, "optim_args must be of type dict or None, got"),
    ({"optim_args": {"eps": torch.ones(1)}}, "must hold numbers, texts"),
    ({"lr_scheduler_type": "step"}, "lr_scheduler_type must be one of"),
    ({"optimizer_state": "average"}, "optimizer_state must be one of"),
    ({"warmup_rounds": 2, "warmup_ratio": 0.1}, "give warmup_rounds or warmup_ratio, not both"),
    ({"warmup_rounds": 3, "lr_scheduler_type": "linear"}, "leaves nothing of num_rounds=3"),
    ({"factor_learning_rate": 0.0}, r"factor_learning_rate must be in \(0, ∞\)"),
    ({"optimizer": "adamw"}, "optimizer is 'adamw': give a class"),
    ({"optimizer": O.AdamW, "optim": "adam"}, "not both"),
    ({"optimizer": O.LBFGS}, "LBFGS evaluates the loss several times"),
    ({"optimizer": Sharpness}, "Sharpness evaluates the loss several times a step"),
    ({"optimizer": same_object()}, "returned the same object twice"),
    ({"optimizer": lambda groups: groups}, "returned a list: return a"),
    ({"optimizer": lambda groups: O.SGD(groups[0]["params"][:1])}, "does not hold all that trains"),
    ({"optimizer": functools.partial(O.AdamW, lr=1e-4)}, "has a learning rate of its own"),
    ({"optimizer": lambda g: O.AdamW(g[0]["params"])}, "has a learning rate of its own"),
    ({"optimizer": functools.partial(O.SGD), "momentum": 0.5}, "let the factory set it"),
    ({"optimizer": Lists, "optimizer_state": "keep"}, "the Lists has a list in its 'seen'"),
    ({"optimizer": CountsInGroup, "optimizer_state": "keep"}, "changes its groups' options"),
    ({"optim": "adafactor", "engine": "batched"}, "engine='batched' is not possible: Adafactor"),
    *[({"optim": "muon", "engine": "batched"}, "engine='batched' is not possible: Muon")][:MUON],
]  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_cannot_be_is_refused_by_name(tmp_path, settings, says):
    with pytest.raises(ArgumentsError, match=says):
        trained(tmp_path, clients(), on_client_error="raise", **settings)


@pytest.mark.parametrize("strategy", [Scaffold(), FedDyn()], ids=["Scaffold", "FedDyn"])
@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw"},
        {"optim": "adafactor"},
        {"optimizer": O.Adam},
        {"momentum": 0.9, "optim_args": "nesterov=True"},
        {"momentum": 0.9, "optim_args": "dampening=0.1"},
        {"optim_args": "maximize=True"},
        {"factor_learning_rate": 0.01},
    ],
    ids=str,
)
def test_strategies_that_count_gradients_refuse_steps_that_are_no_sum(tmp_path, strategy, settings):
    optimizer = settings.get("optimizer")
    args = args_of(tmp_path, **{n: v for n, v in settings.items() if n != "optimizer"})
    with pytest.raises(ArgumentsError, match=f"{type(strategy).__name__} cannot have "):
        FederatedTrainer(build(), args, clients(), strategy=strategy, optimizer=optimizer)


def test_a_rate_for_factors_needs_factors(tmp_path):
    args = args_of(tmp_path, factor_learning_rate=0.01)
    with pytest.raises(ArgumentsError, match="needs trainable FedPara adapters"):
        FederatedTrainer(mlp(), args, [toy()])


def test_numbers_in_an_optimizers_state_are_kept_as_numbers(tmp_path):
    for store in ("memory", "disk"):
        trainer = trained(
            tmp_path / store, clients(), optimizer=Counts, optimizer_state="keep",
            client_store=store,
        )  # fmt: skip
        kept = trainer.client_state(0).optimizer
        assert {int(t) for t in kept["count int"].values()} == {3 * 2 * 3}


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_state_that_is_the_models_own_memory_is_kept_as_it_was(tmp_path, store):
    trainer = trained(
        tmp_path, clients(), LocalOnly(), HoldsTheModel, optimizer_state="keep", client_store=store
    )
    for i in range(3):
        state = trainer.client_state(i)
        assert_near(state.optimizer["last"], state.local)
        assert_near(state.optimizer["again"], state.local)


def test_auto_trains_in_turn_where_the_optimizer_cannot_be_stacked_and_says_so(
    tmp_path, stacked, caplog  # noqa: F811
):  # fmt: skip
    trained(tmp_path / "a", clients(9), num_rounds=1, optim="adamw")
    assert stacked
    assert "one after the other" not in caplog.text
    stacked.clear()
    trained(tmp_path / "b", clients(9), num_rounds=1, optim="adafactor")
    assert not stacked
    assert "clients train one after the other: Adafactor mixes a tensor's entries" in caplog.text


@pytest.mark.skipif(not MUON, reason="this torch has no Muon")
def test_what_a_user_should_know_of_is_said(tmp_path, caplog):
    args = arguments(tmp_path, num_rounds=1, optim="muon")
    FederatedTrainer(build(), args, clients())
    assert "Muon is for matrices: AdamW trains the other" in caplog.text
    assert "learning_rate=0.1 is the default for SGD: Muon usually takes a smaller one" in (
        caplog.text
    )


def test_settings_from_a_command_line():
    parser = HfArgumentParser(FederatedArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "x", "--optim", "adamw", "--optim_args", "betas=(0.9, 0.95), eps=1e-6",
         "--learning_rate", "1e-3", "--factor_learning_rate", "3e-4", "--lr_scheduler_type",
         "cosine", "--warmup_ratio", "0.1", "--optimizer_state", "keep"]
    )  # fmt: skip
    assert args.optim_args == {"betas": (0.9, 0.95), "eps": 1e-6}
    assert (args.optim, args.optimizer_state, args.warmup_ratio) == ("adamw", "keep", 0.1)
    muon = FederatedArguments("x", optim_args="adjust_lr_fn=original, nesterov=False")
    assert muon.optim_args == {"adjust_lr_fn": "original", "nesterov": False}
    assert FederatedArguments("x", optim_args="").optim_args == {}
    assert {"sgd", "adam", "adamw", "adafactor", "rmsprop"} <= optimizers_by_name().keys()
