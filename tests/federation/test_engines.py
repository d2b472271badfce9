"""What the stacked engine cannot do the sequential one does, and nobody's results change."""

import random

import numpy as np
import pytest
import torch
from tests.federation.test_batched import data, run, same, stacked  # noqa: F401
from tests.federation.test_trainer import arguments
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ArgumentsError,
    ClientDataError,
    FederatedTrainer,
    FedProx,
    Scaffold,
    partition,
)


class Base(nn.Module):
    def __init__(self, **extra):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)
        for name, module in extra.items():
            setattr(self, name, module)

    def hidden(self, x):
        return F.relu(self.a(x))

    def forward(self, x):
        return self.b(self.hidden(x))


class FunctionalDropout(Base):
    def hidden(self, x):
        return F.dropout(super().hidden(x), 0.5, self.training)


class AttentionDropout(Base):
    def hidden(self, x):
        h = super().hidden(x).view(-1, 4, 4)
        p = 0.3 if self.training else 0.0
        return F.scaled_dot_product_attention(h, h, h, dropout_p=p).flatten(1)


class RandomPath(Base):
    def hidden(self, x):
        return self.a(x) if torch.rand(()) < 0.5 else super().hidden(x)


class PythonsRandomPath(Base):
    def hidden(self, x):
        return self.a(x) if random.random() < 0.5 else super().hidden(x)


class NumpysRandomPath(Base):
    def hidden(self, x):
        return super().hidden(x) * np.random.uniform(0.5, 1.5)


class DataDependentPath(Base):
    def hidden(self, x):
        h = super().hidden(x)
        return h * 2 if h.mean() > 0.3 else h


class Masks(Base):
    def hidden(self, x):
        h = super().hidden(x)
        return h + h[h > 0.5].sum()


class Counts(Base):
    """Every third call is another."""

    calls = 0

    def hidden(self, x):
        self.calls += 1
        return super().hidden(x) * (1 + self.calls % 3)


class Remembers(Base):
    def __init__(self):
        super().__init__()
        self.seen = []

    def hidden(self, x):
        h = super().hidden(x)
        self.seen.append(h.detach())
        return h


class MovesABuffer(Base):
    """A buffer that no state holds: it goes on from client to client."""

    def __init__(self, assign=False):
        super().__init__()
        self.assign = assign
        self.register_buffer("level", torch.zeros(()), persistent=False)

    def hidden(self, x):
        h = super().hidden(x)
        if self.assign:
            self.level = 0.9 * self.level + 0.1 * h.detach().mean()
        else:
            self.level.mul_(0.9).add_(h.detach().mean(), alpha=0.1)
        return h - self.level


class CountsInABuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def hidden(self, x):
        self.calls += 1
        return super().hidden(x) / self.calls


class HookedActivation(Base):
    """A hook on what forward makes, which a stack would not run as it stands."""

    def hidden(self, x):
        h = super().hidden(x)
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-1e-3, 1e-3) if g.dim() == 2 else g)
        return h


class Recomputes(Base):
    def hidden(self, x):
        return checkpoint(super().hidden, x, use_reentrant=False)


def shrink(parameter):
    parameter.grad.mul_(0.1)


def hooked(kind):
    def build():
        model = Base()
        if kind == "forward":
            model.a.register_forward_hook(lambda m, i, o: o.clamp(max=float(o.detach().mean())))
        elif kind == "forward pre":
            model.a.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
        elif kind == "backward":
            model.b.register_full_backward_hook(lambda m, i, o: (i[0] * 0.1,))
        elif kind == "backward pre":
            model.b.register_full_backward_pre_hook(lambda m, o: (o[0] * 0.1,))
        elif kind == "parameter":
            model.a.weight.register_hook(lambda g: g * 0.1)
        else:
            model.a.weight.register_post_accumulate_grad_hook(shrink)
        return model

    return build


CANNOT = {
    "functional dropout": FunctionalDropout,
    "attention dropout": AttentionDropout,
    "a random path": RandomPath,
    "a path of Python's random": PythonsRandomPath,
    "a path of NumPy's random": NumpysRandomPath,
    "a path that depends on the data": DataDependentPath,
    "indexing by a mask": Masks,
    "a count of its calls": Counts,
    "a memory of its activations": Remembers,
    "a buffer that moves": MovesABuffer,
    "a buffer that is replaced": lambda: MovesABuffer(assign=True),
    "a buffer that counts": CountsInABuffer,
    "hooked activations": HookedActivation,
    **{
        f"a {kind} hook": hooked(kind)
        for kind in (
            "forward", "forward pre", "backward", "backward pre", "parameter", "accumulated",
        )
    },
}  # fmt: skip

CLIENTS = partition(data(120), "iid", 10)


def seeded(build):
    def built():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return build()

    return built


def exactly(one, other):
    for a, b in zip(
        one.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def partly_frozen(build):
    """With something that does not train, so that the clients' rows are run together."""

    def built():
        model = build()
        model.a.bias.requires_grad_(False)
        return model

    return built


WAYS = {"mapped": lambda build: build, "together": partly_frozen}
#: These are every client's own matter where rows are run together; see test_together.py.
FINE_TOGETHER = {"a path that depends on the data", "hooked activations"}
REFUSED = [
    (name, way) for name in CANNOT for way in WAYS if way == "mapped" or name not in FINE_TOGETHER
]


@pytest.mark.parametrize(("name", "way"), REFUSED)
def test_auto_goes_back_with_nothing_changed(tmp_path, caplog, name, way):
    """Bit for bit the sequential engine's results, and the callers' generators as they were."""
    settings = {"clients_per_round": 10, "clients": CLIENTS, "momentum": 0.5, "num_rounds": 2}
    build = WAYS[way](seeded(CANNOT[name]))
    one, history = run(tmp_path / "a", "sequential", build, **settings)
    drawn = torch.rand(1), random.random(), np.random.rand()
    caplog.clear()
    other, again = run(tmp_path / "b", "auto", build, **settings)
    assert drawn == (torch.rand(1), random.random(), np.random.rand())
    exactly(one, other)
    assert [r.train_loss for r in history] == [r.train_loss for r in again]
    said = [r for r in caplog.records if "one after the other" in r.getMessage()]
    assert len(said) == (0 if name.endswith(" hook") else 1)  # hooks are seen without a try
    assert vars(other.model).get("calls", 0) == vars(one.model).get("calls", 0)
    assert len(getattr(other.model, "seen", ())) == len(getattr(one.model, "seen", ()))
    for a, b in zip(one.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "way"), REFUSED)
def test_batched_says_why_it_cannot(tmp_path, name, way):
    with pytest.raises(ArgumentsError, match=r"engine='batched' is not possible: .*sequential"):
        run(tmp_path, "batched", WAYS[way](seeded(CANNOT[name])), clients=CLIENTS)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("functional dropout", "random operation"),
        ("a path of Python's random", "draws random numbers from Python's random"),
        ("a path of NumPy's random", "draws random numbers from NumPy"),
        ("a count of its calls", "its forward changes 'calls' of the model"),
        ("a memory of its activations", "its forward changes what the model holds"),
        ("a buffer that counts", "its forward changes the buffer 'calls'"),
        ("a forward hook", "hooks would see, or miss, the stacked tensors"),
    ],
)
def test_the_reason_is_the_models(tmp_path, name, why):
    with pytest.raises(ArgumentsError, match=why):
        run(tmp_path, "batched", seeded(CANNOT[name]), clients=CLIENTS)


class Unused(Base):
    """A layer that takes no part, one that does in training only, and one that is frozen."""

    def __init__(self):
        super().__init__(never=nn.Linear(3, 3), frozen=nn.Linear(16, 16))
        self.frozen.requires_grad_(False)

    def hidden(self, x):
        return F.relu(self.frozen(super().hidden(x)))


class Tied(Base):
    """One weight in two layers, and one layer called twice."""

    def __init__(self):
        super().__init__(c=nn.Linear(16, 16))
        self.c.weight = self.a.weight

    def hidden(self, x):
        return self.c(torch.tanh(self.a(super().hidden(x))))


class WithConstants(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((16,), 0.5), persistent=False)

    def hidden(self, x):
        return super().hidden(x) * self.scale


class BatchStatistics(Base):
    """Batch norm without running statistics is a function of its batch."""

    def __init__(self):
        super().__init__(norm=nn.BatchNorm1d(16, track_running_stats=False))

    def hidden(self, x):
        return self.norm(super().hidden(x))


class InPlace(Base):
    def hidden(self, x):
        return self.a(x).mul_(2).relu_()


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


class Parametrized(Base):
    def __init__(self):
        super().__init__()
        nn.utils.parametrize.register_parametrization(self.a, "weight", Symmetric())


CAN = {
    "unused, frozen": Unused,
    "tied": Tied,
    "constant buffers": WithConstants,
    "batch statistics": BatchStatistics,
    "in place": InPlace,
    "parametrized": Parametrized,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", [None, FedProx(0.5), Scaffold()], ids=["avg", "prox", "sc"])
@pytest.mark.parametrize("name", CAN)
def test_what_can_be_stacked_is_the_same(tmp_path, stacked, name, strategy, way):  # noqa: F811
    settings = {
        "weight_decay": 0.1, "clients": CLIENTS, "num_rounds": 3, "momentum": 0.9,
        # SCAFFOLD has no clipping beside decay.
        "max_grad_norm": None if isinstance(strategy, Scaffold) else 0.5,
    }  # fmt: skip
    build = WAYS[way](seeded(CAN[name]))
    one = run(tmp_path / "a", "sequential", build, strategy, **settings)
    assert not stacked
    other = run(tmp_path / "b", "batched", build, strategy, **settings)
    assert stacked
    same(one, other)


def test_what_takes_no_part_is_not_decayed_by_either_engine(tmp_path):
    for engine in ("sequential", "batched"):
        first = seeded(Unused)().double()
        trainer, _ = run(tmp_path / engine, engine, seeded(Unused), weight_decay=0.1)
        for name in ("never.weight", "never.bias", "frozen.weight"):
            assert torch.equal(trainer.model.state_dict()[name], first.state_dict()[name])
        assert not torch.equal(trainer.model.a.weight, first.a.weight)


@pytest.mark.parametrize("engine", ["auto", "batched"])
def test_clients_whose_rows_have_other_shapes_go_in_stacks_of_their_own(tmp_path, stacked, engine):  # noqa: F811
    class AnyLength(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 4)

        def forward(self, x):
            return self.layer(x.mean(1))

    def clients():
        g = torch.Generator().manual_seed(0)
        lengths = [3, 5] * 8
        return [
            TensorDataset(
                torch.randn(12, n, 2, generator=g).double(), torch.randint(0, 4, (12,), generator=g)
            )
            for n in lengths
        ]

    settings = {"clients": clients(), "clients_per_round": 16}
    one = run(tmp_path / "a", "sequential", seeded(AnyLength), **settings)
    other = run(tmp_path / "b", engine, seeded(AnyLength), **settings)
    assert set(stacked) == {8}
    same(one, other)


def test_recomputed_activations_are_the_same_or_go_one_by_one(tmp_path):
    settings = {"clients_per_round": 10, "clients": CLIENTS}
    one = run(tmp_path / "a", "sequential", seeded(Recomputes), **settings)
    other = run(tmp_path / "b", "auto", seeded(Recomputes), **settings)
    same(one, other)


def test_an_error_of_the_data_is_the_sequential_engines(tmp_path, caplog):
    """A label beyond the classes is said of its client, not of the stack."""
    bad = TensorDataset(torch.randn(12, 16).double(), torch.full((12,), 9))
    names = dict(zip("abcdefghij", [*CLIENTS[:9], bad], strict=True))
    args = arguments(tmp_path, clients_per_round=10, on_client_error="raise")
    with pytest.raises(ClientDataError, match=r"client 'j': a label is not in \[0, 4\)"):
        FederatedTrainer(Base().double(), args, names).train()


def test_a_loss_that_mixes_inputs_by_numpy_is_not_stacked(tmp_path):
    def mixed(model, batch):
        share = np.random.beta(1, 1)
        x = share * batch[0] + (1 - share) * batch[0].flip(0)
        return F.cross_entropy(model(x), batch[1])

    args = arguments(tmp_path, clients_per_round=10, engine="batched")
    with pytest.raises(ArgumentsError, match="draws random numbers from NumPy"):
        FederatedTrainer(Base().double(), args, CLIENTS, compute_loss=mixed).train()
