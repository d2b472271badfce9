"""The clients' SGD against torch's class, bit for bit."""

import itertools

import pytest
import torch
from tests.federation.test_trainer import arguments
from torch import nn
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedpara_peft.federation.client.optimizer import Optimizers
from fedpara_peft.federation.client.sgd import _Step, step_of
from fedpara_peft.federation.client.steps import Steps

SHAPES = {"w": (7, 5), "b": (7,), "x": (3, 4), "y": (5, 4), "scalar": ()}
OPTIONS = [
    {"momentum": momentum, "weight_decay": decay, **more}
    for momentum, decay in itertools.product((0.0, 0.9), (0.0, 0.03))
    for more in ({}, {"maximize": True}, {"nesterov": True}, {"dampening": 0.3})
    if momentum or not ("nesterov" in more or "dampening" in more)
]


def parameters(dtypes=(torch.float32,)):
    torch.manual_seed(0)
    kinds = itertools.cycle(dtypes)
    return {n: nn.Parameter(torch.randn(s, dtype=next(kinds))) for n, s in SHAPES.items()}


def give_gradients(step, *models):
    """Other parameters go without one at every step; the last one has none before the third."""
    generator = torch.Generator().manual_seed(step)
    for i, name in enumerate(SHAPES):
        found = torch.randn(SHAPES[name], generator=generator)
        without = i % 3 == step % 3 if step % 2 else (name == "scalar" and step < 4)
        for model in models:
            model[name].grad = None if without else found.to(model[name].dtype)


def groups(model):
    names = list(model)
    return [
        {"params": [model[n] for n in names[:2]], "lr": 0.1},
        {"params": [model[n] for n in names[2:]], "lr": 0.007},
    ]


def assert_same(model, twin, optimizer, reference):
    for name in model:
        assert torch.equal(model[name], twin[name]), name
        ours = optimizer.state[model[name]].get("momentum_buffer")
        theirs = reference.state[twin[name]].get("momentum_buffer")
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("dtypes", "foreach"),
    [
        ((torch.float32,), None),
        ((torch.float32,), True),
        ((torch.float64, torch.bfloat16), None),
    ],
    ids=["one dtype", "one dtype, foreach", "two dtypes"],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_that_of_torchs_class(options, dtypes, foreach):
    model, twin = parameters(dtypes), parameters(dtypes)
    optimizer = SGD(groups(model), **options)
    reference = SGD(groups(twin), foreach=foreach, **options)
    step = step_of(optimizer)
    assert step != optimizer.step
    for number in range(8):
        give_gradients(number, model, twin)
        with torch.no_grad():
            step()
        reference.step()
        assert_same(model, twin, optimizer, reference)


def test_without_any_gradient_nothing_moves():
    model, twin = parameters(), parameters()
    optimizer = SGD(groups(model), momentum=0.9, weight_decay=0.1)
    step_of(optimizer)()
    assert all(torch.equal(model[n], twin[n]) for n in model)


def test_sparse_gradients_step_as_torchs():
    tables = [
        nn.Embedding.from_pretrained(torch.ones(6, 3), freeze=False, sparse=True) for _ in "ab"
    ]
    optimizers = [SGD(t.parameters(), 0.1, momentum=0.9) for t in tables]
    steps = [step_of(optimizers[0]), optimizers[1].step]
    for rows in ([1, 2], [2, 2, 5]):
        for table, optimizer, step in zip(tables, optimizers, steps, strict=True):
            optimizer.zero_grad()
            table(torch.tensor(rows)).pow(2).sum().backward()
            with torch.no_grad():
                step()
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert not torch.equal(tables[0].weight, torch.ones(6, 3))


def test_state_that_was_loaded_goes_on():
    model, twin = parameters(), parameters()
    reference = SGD(groups(twin), momentum=0.9, nesterov=True)
    for number in range(3):
        give_gradients(number, twin)
        reference.step()
    with torch.no_grad():
        for name in model:
            model[name].copy_(twin[name])
    optimizer = SGD(groups(model), momentum=0.9, nesterov=True)
    for name in model:
        for part, value in reference.state[twin[name]].items():
            optimizer.state[model[name]][part] = value.clone()
    step = step_of(optimizer)
    for number in range(3, 8):
        give_gradients(number, model, twin)
        with torch.no_grad():
            step()
        reference.step()
        assert_same(model, twin, optimizer, reference)


class OwnSGD(SGD):
    pass


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OwnSGD, {}),
        (SGD, {"foreach": True}),
        (SGD, {"fused": True}),
        (SGD, {"differentiable": True}),
        (SGD, {"lr": torch.tensor(0.1)}),
        (torch.optim.AdamW, {}),
    ],
    ids=lambda v: str(getattr(v, "__name__", v)),
)
def test_what_is_not_plain_sgd_steps_by_itself(kind, options):
    optimizer = kind(parameters().values(), **{"lr": 0.1, **options})
    assert step_of(optimizer) == optimizer.step


@pytest.mark.parametrize("whose", ["its own", "everybody's", "a wrapper"])
def test_hooks_are_called(whose):
    model, called = parameters(), []
    optimizer = SGD(model.values(), 0.1)
    note = lambda *_: called.append(1)  # noqa: E731
    handle = None
    if whose == "its own":
        handle = optimizer.register_step_pre_hook(note)
    elif whose == "everybody's":
        handle = register_optimizer_step_post_hook(note)
    else:
        plain = optimizer.step
        optimizer.step = lambda: (note(), plain())
    try:
        give_gradients(0, model)
        step_of(optimizer)()
    finally:
        if handle is not None:
            handle.remove()
    assert called


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 1e6, "momentum": 0.9, "weight_decay": 0.01},
        {"max_grad_norm": 2.0, "momentum": 0.9, "optim_args": {"nesterov": True}},
        {"factor_learning_rate": 0.003, "momentum": 0.5, "optim_args": {"dampening": 0.1}},
    ],
    ids=lambda s: " ".join(s),
)
def test_a_clients_steps_are_torchs_loop(tmp_path, settings):
    model, twin = parameters(), parameters()
    args = arguments(tmp_path, learning_rate=0.05, **settings)
    factors = ["x", "y"] if args.factor_learning_rate else []
    optimizers = Optimizers(args, None, model, factors)
    steps = Steps(optimizers, args, 0, model, {}, [None], [{}])
    assert isinstance(steps._moves[0], _Step) or factors
    options = {"momentum": args.momentum, "weight_decay": args.weight_decay}
    rates = [args.factor_learning_rate if n in factors else 0.05 for n in twin]
    reference = SGD(
        [{"params": [p], "lr": rate} for p, rate in zip(twin.values(), rates, strict=True)],
        **{**options, **(args.optim_args or {})},
    )
    for number in range(8):
        give_gradients(number, model)
        give_gradients(number, twin)
        steps.step([(torch.tensor(1.0), 4.0)])
        if args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(twin.values(), args.max_grad_norm)
        reference.step()
        for name in model:
            assert torch.equal(model[name], twin[name]), name
