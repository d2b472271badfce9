"""Ranks and counts: the paper's and the notebook's integers, and the laws by brute force."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpara_peft import RankError, parameter_count, rank_bounds, rank_for_gamma, rank_for_ratio
from fedpara_peft.maths import rank
from fedpara_peft.maths.rank import low_rank_matching

SIZES = st.integers(1, 60)
KERNELS = st.sampled_from([None, 1, 3, (3, 1), (2,), (3, 3, 3)])
VGG16 = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


def positions(kernel):
    return 1 if kernel is None else kernel**2 if isinstance(kernel, int) else math.prod(kernel)


def test_table_1():
    assert 256 * 256 == 65_536
    assert parameter_count(16, 256, 256) == 16_384
    assert parameter_count(16, 256, 256 * 9) == 81_920  # the kernel as a matrix, Prop. 1
    assert parameter_count(16, 256, 256, 3) == 20_992  # Prop. 3
    assert pytest.approx(3.9, abs=0.01) == 81_920 / 20_992


@pytest.mark.parametrize(
    ("gamma", "total"), [(0.1, 1_546_844), (0.3, 3_313_256), (0.4, 4_485_686), (None, 15_253_578)]
)
def test_vgg16_totals(gamma, total):
    """13 convolutions; norms and the dense layers 512-512-10 stay as they are."""
    pairs = list(itertools.pairwise(VGG16))
    count = sum(out + 2 * out for _, out in pairs)  # bias and group norm
    count += 2 * (512 * 512 + 512) + 512 * 10 + 10
    for inside, out in pairs:
        if gamma is None:
            count += inside * out * 9
        else:
            count += parameter_count(rank_for_gamma(gamma, out, inside, 3), out, inside, 3)
    assert count == total


def test_shares_of_vgg16_are_the_papers():
    for total, share in ((1_546_844, 10.15), (4_485_686, 29.4), (3_313_256, 21.8)):
        assert 100 * total / 15_253_578 == pytest.approx(share, abs=0.15)


def test_notebook_counts():
    counts = [
        parameter_count(rank_for_ratio(ratio, 256, 256, 3), 256, 256, 3)
        for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert counts == [60_192, 178_050, 296_434, 414_792, 533_192]


def test_lstm_ranks():
    assert rank_for_gamma(0, 1024, 256) == 16
    assert rank_for_gamma(0, 1024, 8) == 3


def test_gamma_is_exact_where_floats_are_off_by_one(monkeypatch):
    assert math.ceil((1 - 0.1) * 1 + 0.1 * 41) == 6  # what floating point makes of 5
    monkeypatch.setattr(rank, "rank_bounds", lambda *_: rank.RankBounds(1, 41))
    assert rank.rank_for_gamma(0.1, 99, 99) == 5


@given(SIZES, SIZES, KERNELS)
def test_bounds_by_brute_force(m, n, kernel):
    low, high = rank_bounds(m, n, kernel)
    k = positions(kernel)
    assert low == next(r for r in range(1, 100) if r * r >= min(m, n))
    fits = [r for r in range(1, 400) if parameter_count(r, m, n, kernel) <= m * n * k]
    assert high == (max(fits) if fits else 0)


@given(SIZES, SIZES, KERNELS, st.integers(0, 100))
def test_gamma_interpolates(m, n, kernel, percent):
    low, high = rank_bounds(m, n, kernel)
    if high < low:
        with pytest.raises(RankError, match="leave this layer dense"):
            rank_for_gamma(percent / 100, m, n, kernel)
        return
    gamma = Fraction(percent, 100)
    expected = next(r for r in range(500) if r >= (1 - gamma) * low + gamma * high)
    assert rank_for_gamma(percent / 100, m, n, kernel) == expected
    assert parameter_count(expected, m, n, kernel) <= m * n * positions(kernel)


@given(SIZES, SIZES, KERNELS, st.integers(1, 20))
def test_low_rank_of_equal_size(m, n, kernel, r):
    target = parameter_count(r, m, n, kernel)
    found = low_rank_matching(r, m, n, kernel)
    assert parameter_count(found, m, n, kernel, "lowrank") >= target
    assert found == 1 or parameter_count(found - 1, m, n, kernel, "lowrank") < target
    if positions(kernel) == 1:
        assert found == 2 * r


@given(st.integers(1, 12), SIZES, SIZES)
def test_proposition_2_equal_ranks_are_the_cheapest(target, m, n):
    """Among r₁ r₂ >= R², r₁ = r₂ = R has the fewest parameters, and is alone in it."""
    costs = {
        (a, b): (a + b) * (m + n)
        for a in range(1, target**2 + 1)
        for b in range(1, target**2 + 1)
        if a * b >= target**2
    }
    best = min(costs.values())
    assert [pair for pair, cost in costs.items() if cost == best] == [(target, target)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rank_for_gamma(1.5, 8, 8), r"gamma must be in \[0, 1\], got 1.5"),
        (lambda: rank_for_gamma(-0.1, 8, 8), r"gamma must be in \[0, 1\]"),
        (lambda: rank_for_gamma(float("nan"), 8, 8), r"gamma must be in \[0, 1\]"),
        (lambda: parameter_count(0, 8, 8), "positive integer value but the value passed is 0"),
        (lambda: parameter_count(True, 8, 8), "positive integer"),
        (lambda: rank_bounds(0, 8), "sizes must be at least 1"),
        (lambda: rank_for_ratio(0, 8, 8), r"ratio must be in \(0, 1\]"),
    ],
)
def test_errors_name_rule_and_value(call, says):
    with pytest.raises(RankError, match=says):
        call()
