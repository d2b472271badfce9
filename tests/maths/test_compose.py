"""Composition against sums written out, and the rank laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpara_peft import RankError
from fedpara_peft.maths.compose import Half, compose, compose_half, reachable_rank

KERNELS = [(), (1,), (3,), (3, 2), (1, 1), (2, 1, 3)]


def random_half(m, n, r, kernel=(), dtype=torch.float64):
    t = torch.randn(r, r, *kernel, dtype=dtype) if kernel else None
    return Half(torch.randn(m, r, dtype=dtype), torch.randn(n, r, dtype=dtype), t)


def slow_half(half):
    """Entry by entry, as the equation says."""
    x, y, t = half
    m, n, r = x.shape[0], y.shape[0], x.shape[1]
    kernel = t.shape[2:] if t is not None else ()
    w = torch.zeros(m, n, *kernel, dtype=x.dtype)
    for o in range(m):
        for i in range(n):
            for a in range(r):
                if t is None:
                    w[o, i] += x[o, a] * y[i, a]
                else:
                    for b in range(r):
                        w[o, i] += t[a, b] * x[o, a] * y[i, b]
    return w


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tanh", [None, "tanh"])
@pytest.mark.parametrize("name", ["fedpara", "pfedpara", "lowrank"])
def test_compose_is_the_equation(name, tanh, kernel):
    if name == "lowrank" and tanh:
        return
    halves = [random_half(5, 4, 3, kernel) for _ in range(1 if name == "lowrank" else 2)]
    parts = [slow_half(h) for h in halves]
    if tanh:
        parts = [p.tanh() for p in parts]
    expected = {
        "lowrank": lambda: parts[0],
        "fedpara": lambda: parts[0] * parts[1],
        "pfedpara": lambda: parts[0] * (parts[1] + 1),
    }[name]()
    actual = compose(halves, name, tanh)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize("name", ["fedpara", "pfedpara"])
def test_gradients(name, kernel):
    factors = [f.requires_grad_() for _ in range(2) for f in random_half(3, 4, 2, kernel).tensors()]
    half = len(factors) // 2

    def function(*tensors):
        return compose([Half(*tensors[:half]), Half(*tensors[half:])], name, "tanh")

    assert torch.autograd.gradcheck(function, factors)
    assert torch.autograd.gradgradcheck(function, factors)


def unfoldings(w):
    m, n = w.shape[:2]
    return w.reshape(m, -1), w.transpose(0, 1).reshape(n, -1)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 20), st.integers(2, 20), st.booleans())
def test_rank_laws(r1, r2, m, n, kernel):
    """Prop. 1 and 3: rank <= r₁ r₂; pFedPara <= r₁ r₂ + r₁; low rank <= r."""
    shape = (3, 3) if kernel else ()
    halves = [random_half(m, n, r1, shape), random_half(m, n, r2, shape)]
    for name, parts in (("fedpara", halves), ("pfedpara", halves), ("lowrank", halves[:1])):
        bound = reachable_rank((r1, r2), name, None)
        for unfolded in unfoldings(compose(parts, name)):
            assert torch.linalg.matrix_rank(unfolded) <= bound


def test_tanh_is_not_bounded_by_the_inner_rank():
    halves = [random_half(30, 30, 2), random_half(30, 30, 2)]
    assert torch.linalg.matrix_rank(compose(halves)) == 4
    assert torch.linalg.matrix_rank(compose(halves, nonlinearity="tanh")) > 20
    assert reachable_rank((2, 2), "fedpara", "tanh") is None


def test_figure_6_full_rank_at_the_least_rank():
    full = sum(
        int(torch.linalg.matrix_rank(compose([random_half(100, 100, 10) for _ in "12"]))) == 100
        for _ in range(100)
    )
    assert full >= 99


def test_at_r_min_only_the_smaller_channel_unfolding_is_full():
    w = compose([random_half(128, 64, 8, (3, 3)) for _ in "12"])
    over_out, over_in = (int(torch.linalg.matrix_rank(u)) for u in unfoldings(w))
    assert (over_out, over_in) == (64, 64)  # 64 of 128, 64 of 64


def test_errors():
    with pytest.raises(RankError, match="disagree on the rank"):
        compose_half(Half(torch.zeros(3, 2), torch.zeros(3, 4)))
    with pytest.raises(RankError, match="takes 2 halves, got 1"):
        compose([random_half(3, 3, 1)])
    with pytest.raises(RankError, match="lowrank has no nonlinearity"):
        compose([random_half(3, 3, 1)], "lowrank", "tanh")
