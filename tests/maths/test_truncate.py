"""The best low rank from the factors, against the dense singular value decomposition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpara_peft import RankError
from fedpara_peft.maths.apply import LowRankForm, low_rank_form
from fedpara_peft.maths.approximation.truncate import (
    exact_pair,
    relative_error,
    singular_values,
    truncate,
)
from fedpara_peft.maths.compose import Half, compose

HALVES = {"fedpara": 2, "pfedpara": 2, "lowrank": 1}
SHAPES = [
    (30, 20, 3, ()), (5, 20, 4, ()), (20, 5, 4, ()), (7, 7, 1, ()),
    (12, 9, 3, (3, 2)), (5, 4, 3, (3,)), (4, 6, 2, (2, 3, 2)),
]  # fmt: skip


def drawn(name, m, n, r, kernel, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return [
        Half(draw(m, r), draw(n, r), draw(r, r, *kernel) if kernel else None)
        for _ in range(HALVES[name])
    ]


def checked(halves, name, k, scale=1.0):
    form = low_rank_form(halves, name)
    weight = scale * compose(halves, name).flatten(1)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    found = truncate(form, rank=k, scale=scale)
    values = found.singular_values
    count = min(len(s), len(values))
    assert (values[:count] - s[:count]).abs().max() <= 1e-6 * s[0]
    assert (values[count:] <= 1e-6 * s[0]).all()
    assert (s[count:] <= 1e-6 * s[0]).all()
    best = (u[:, :k] * s[:k]) @ v[:k]
    product = found.pair.up @ found.pair.down.flatten(1)
    error = float((weight - product).norm() / weight.norm())
    optimal = float((weight - best).norm() / weight.norm())
    assert error == pytest.approx(optimal, rel=1e-6, abs=1e-7)
    assert found.error == pytest.approx(error, abs=1e-7)
    assert relative_error(form, found.pair, scale) == pytest.approx(error, abs=1e-7)
    kernel = () if form.core is None else form.core.shape[2:]
    assert found.pair.down.shape[1:] == (halves[0].y.shape[0], *kernel)
    return found


@pytest.mark.parametrize("k", [1, 4, 9, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_the_best_rank_is_the_dense_ones(name, shape, k):
    found = checked(drawn(name, *shape), name, k, scale=-0.37)
    assert found.pair.up.shape == (shape[0], found.pair.down.shape[0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 4),
    st.sampled_from([(), (1,), (3,), (2, 2)]), st.integers(1, 20), st.integers(0, 9999),
)  # fmt: skip
def test_any_shape(m, n, r, kernel, k, seed):
    checked(drawn("fedpara", m, n, r, kernel, seed=seed), "fedpara", k)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.1, 0.5, 0.9])
def test_a_tolerance_takes_the_least_rank(kernel, tolerance):
    halves = drawn("fedpara", 20, 15, 3, kernel)
    form = low_rank_form(halves, "fedpara")
    found = truncate(form, tolerance=tolerance)
    k = found.pair.up.shape[1]
    assert found.error <= tolerance
    assert k == 1 or truncate(form, rank=k - 1).error > tolerance
    if tolerance == 0:
        assert k == 9


def test_a_rank_that_is_not_full():
    """Columns that repeat, a half that is zero, one column: nothing is divided by zero."""
    x, y = torch.randn(8, 3), torch.randn(7, 3)
    twin = Half(x[:, [0, 0, 1]], y[:, [0, 0, 1]])
    for halves in ([twin, twin], [Half(x, y), Half(x, torch.zeros(7, 3))]):
        form = low_rank_form([half.to(torch.float64) for half in halves], "fedpara")
        found = truncate(form, rank=6)
        weight = compose([half.to(torch.float64) for half in halves]).double()
        product = found.pair.up @ found.pair.down
        assert torch.isfinite(product).all()
        assert (weight - product).abs().max() <= 1e-7 * max(1.0, float(weight.abs().max()))
        assert found.error < 1e-7


def test_the_root_of_each_value_is_in_either_factor():
    found = checked(drawn("fedpara", 30, 20, 3, ()), "fedpara", 5)
    up, down = found.pair
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    torch.testing.assert_close(up.norm(dim=0).square(), found.singular_values[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_taken_as_it_is(dtype):
    halves = drawn("fedpara", 30, 20, 3, (), dtype)
    exact = [half.to(torch.float64) for half in halves]
    found = truncate(low_rank_form(exact, "fedpara"), rank=4)
    s = torch.linalg.svdvals(compose(exact))
    assert (found.singular_values - s[:9]).abs().max() <= 1e-6 * s[0]
    assert found.pair.up.dtype == torch.float64


def test_the_exact_pair_and_the_error_of_any_other():
    halves = drawn("fedpara", 12, 9, 2, (3,))
    form = low_rank_form(halves, "fedpara")
    up, down = exact_pair(form, 0.3)
    torch.testing.assert_close(up @ down.flatten(1), 0.3 * compose(halves).flatten(1))
    assert relative_error(form, exact_pair(form, 0.3), 0.3) < 1e-7
    assert relative_error(form, exact_pair(form, 0.6), 0.3) == pytest.approx(1)
    zero = LowRankForm(torch.zeros(3, 2), torch.zeros(4, 2))
    assert relative_error(zero, exact_pair(zero)) == 0
    ones = exact_pair(LowRankForm(torch.ones(3, 2), torch.ones(4, 2)))
    assert relative_error(zero, ones) == math.inf
    assert truncate(zero, rank=2).error == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either a rank or a tolerance"),
        ({"rank": 2, "tolerance": 0.1}, "not both"),
        ({"rank": 0}, "integer from 1"),
        ({"rank": True}, "integer from 1"),
        ({"tolerance": -0.1}, r"\[0, 1\)"),
        ({"tolerance": float("nan")}, r"\[0, 1\)"),
    ],
)
def test_what_cannot_be_asked(options, says):
    form = low_rank_form(drawn("fedpara", 5, 4, 2, ()), "fedpara")
    with pytest.raises(RankError, match=says):
        truncate(form, **options)


def test_a_weight_that_is_not_finite():
    form = low_rank_form(drawn("fedpara", 5, 4, 2, ()), "fedpara")
    form.a[0, 0] = float("nan")
    with pytest.raises(RankError, match="not finite"):
        truncate(form, rank=2)
    assert len(singular_values(form._replace(a=torch.ones(5, 4).double()))) == 4
