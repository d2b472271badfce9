"""A parameterization of one's own is its terms; all else follows, compared with plain formulas."""

import pytest
import torch
from tests.own_parameterizations import OWN, by_hand

from fedpara_peft import RankError, parameter_count
from fedpara_peft.maths.apply import by_rows, form_rank, linear, low_rank_form
from fedpara_peft.maths.compose import Half, add_composed_, compose, compose_shared, reachable_rank
from fedpara_peft.maths.parameterizations import (
    FEDPARA,
    PARAMETERIZATIONS,
    Parameterization,
    get_parameterization,
)
from fedpara_peft.maths.rank import matching_rank
from fedpara_peft.maths.starts.variances import factor_std, half_variances, identity_start_stds


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, own in OWN.items():
        monkeypatch.setitem(PARAMETERIZATIONS, name, own)


def halves(name, m=6, n=5, r=2, kernel=()):
    def make():
        t = torch.randn(r, r, *kernel, dtype=torch.float64) if kernel else None
        x, y = torch.randn(m, r, dtype=torch.float64), torch.randn(n, r, dtype=torch.float64)
        return Half(x, y, t)

    return [make() for _ in range(OWN[name].num_halves)]


def composed_by_hand(name, parts, tanh=False):
    whole = [
        h.x @ h.y.T if h.t is None else torch.einsum("oa,ab...,ib->oi...", h.x, h.t, h.y)
        for h in parts
    ]
    return by_hand(name, [torch.tanh(w) for w in whole] if tanh else whole)


@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize("tanh", [None, "tanh"])
@pytest.mark.parametrize("name", OWN)
def test_it_composes(name, tanh, kernel):
    parts = halves(name, kernel=kernel)
    weight = composed_by_hand(name, parts, tanh == "tanh")
    torch.testing.assert_close(compose(parts, name, tanh), weight)
    base = torch.randn_like(weight)
    total = base.clone()
    torch.testing.assert_close(
        compose(parts, name, tanh, scale=1.7, base=base), base + 1.7 * weight
    )
    add_composed_(total, parts, name, tanh, scale=-0.3, chunk_entries=7)
    torch.testing.assert_close(total, base - 0.3 * weight)


@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize("name", OWN)
def test_its_low_rank_form_is_the_weight(name, kernel):
    parts = halves(name, kernel=kernel)
    a, b, core = low_rank_form(parts, name)
    assert a.shape[1] == b.shape[1] == form_rank(2, name)
    weight = a @ b.T if core is None else torch.einsum("oa,ab...,ib->oi...", a, core, b)
    torch.testing.assert_close(weight, composed_by_hand(name, parts))


@pytest.mark.parametrize("name", OWN)
def test_it_is_applied_and_differentiated_twice(name):
    factors = [f.requires_grad_() for h in halves(name) for f in h.tensors()]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def function(x, *factors):
        parts = [Half(*factors[i : i + 2]) for i in range(0, len(factors), 2)]
        return linear(x, parts, name, 1.7)

    parts = [Half(*factors[i : i + 2]) for i in range(0, len(factors), 2)]
    expected = 1.7 * x @ composed_by_hand(name, parts).T
    torch.testing.assert_close(function(x, *factors), expected)
    assert torch.autograd.gradcheck(function, (x, *factors))
    assert torch.autograd.gradgradcheck(function, (x, *factors))
    with torch.no_grad():
        torch.testing.assert_close(1.7 * by_rows(x, parts, name), expected)
        torch.testing.assert_close(function(x[:1], *factors), expected[:1])  # a row: by rows


@pytest.mark.parametrize(("name", "bound"), [("three", 27), ("square", 9), ("personal three", 36)])
def test_it_reaches_its_rank_and_no_more(name, bound):
    """Of r = 3: a square has the r (r + 1) / 2 products of its columns, and r more."""
    assert reachable_rank([3] * OWN[name].num_halves, name, None) == bound
    found = torch.linalg.matrix_rank(compose(halves(name, 50, 45, 3), name))
    assert found == bound


def test_its_parameters_are_its_halves():
    assert parameter_count(3, 20, 10, (3, 3), "three") == 3 * (3 * 30 + 9 * 9)
    assert parameter_count(3, 20, 10, None, "square") == 3 * 30
    # γ means as many parameters as FedPara's, whatever the number of halves.
    assert [matching_rank(6, 20, 10, None, name) for name in ("pfedpara", "three", "square")] == [
        6,
        4,
        12,
    ]


@pytest.mark.parametrize("name", OWN)
def test_a_fresh_weight_has_the_variance_that_was_asked_for(name):
    found = []
    for _ in range(20):
        parts = []
        for v in half_variances(0.04, name):
            std = factor_std(v, 8)
            parts.append(Half(*(std * torch.randn(s, 8, dtype=torch.float64) for s in (150, 120))))
        found.append(float(compose(parts, name).var()))
    assert sum(found) / len(found) == pytest.approx(0.04, rel=0.15)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("name", OWN)
def test_first_step_of_an_identity_start(name, kernel):
    """As for the package's own: as far as a LoRA of as many values."""
    m, n, r = 60, 30, 4
    fan_in = n * (9 if kernel else 1)
    stds = identity_start_stds(r, fan_in, name, kernel=bool(kernel))
    own, ratios, eta = OWN[name], [], 1e-6
    for _ in range(200):
        drawn = zip(halves(name, m, n, r, kernel), stds, strict=True)
        parts = [Half(*(s * f for f, s in zip(h.tensors(), of, strict=False))) for h, of in drawn]
        for index in own.zero_halves:
            parts[index].x.zero_()
        factors = [f.requires_grad_() for h in parts for f in h.tensors()]
        gradient = torch.randn(m, n, *kernel, dtype=torch.float64)
        steps = torch.autograd.grad(compose(parts, name), factors, gradient)
        moved = iter([f - eta * g for f, g in zip(factors, steps, strict=True)])
        after = [Half(next(moved), next(moved), next(moved) if kernel else None) for _ in parts]
        step = -compose(after, name).detach() / eta
        ratios.append(float((step * gradient).sum() / gradient.square().sum()))
    values = {"three": 3 * r, "personal three": 2 * r}.get(name, r)
    expected = values / (3 * fan_in)
    assert sum(ratios) / len(ratios) == pytest.approx(expected, rel=0.25)


def test_what_the_global_halves_compose_to():
    parts = halves("personal three")
    w1, w2, _ = (h.x @ h.y.T for h in parts)
    torch.testing.assert_close(compose_shared(parts, "personal three"), w1 * w2)
    torch.testing.assert_close(compose_shared(parts[:2], "fedpara"), w1 * w2)
    torch.testing.assert_close(compose_shared(parts[:2], "pfedpara", "tanh"), torch.tanh(w1))
    assert [OWN[name].is_multilinear for name in OWN] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"terms": ((0, 2),)}, "without a gap"),
        ({"terms": ((0, 1), (0,)), "variances": lambda v, tanh: (v, v)}, "does not start as 0"),
        ({"terms": ((0, 0),), "zero_halves": (0,)}, "has a gradient"),
        ({"terms": ((0, 1),), "local_halves": (1,)}, "nothing is left"),
        ({"terms": ((0, 1), (0,)), "zero_halves": (0,)}, "`variances`"),
    ],
)
def test_one_that_cannot_be_learned_is_refused(changes, said):
    with pytest.raises(RankError, match=said):
        Parameterization(**{"name": "x", "formula": "", "zero_halves": (1,), **changes})


def test_an_unknown_name_is_refused_and_the_known_are_named():
    assert get_parameterization("fedpara") is FEDPARA
    with pytest.raises(RankError, match=r"'pfedpara', 'lowrank'.* 'three'.* got 'loha'"):
        get_parameterization("loha")
