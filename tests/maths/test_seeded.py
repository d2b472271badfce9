"""A seeded base comes out in the same bits, and factors have the response that was asked for."""

import math

import pytest
import torch

from fedpara_peft.maths.compose import Half, compose
from fedpara_peft.maths.parameterizations import get_parameterization
from fedpara_peft.maths.starts.seeded import base_digest, seeded_base, seeded_halves, seeded_uniform

#: As they came out on the first machine; another processor, system or version gives the same.
FIRST = [-0.5205370732815033, 0.19699381675407057, -0.23555892193803807, -0.3780778634886912]
DIGEST, LARGE = "b557e142d68dd9c7", "303f542f9d598d59"

SIZES = {(): ((7, 3), (5, 3)), (3, 2): ((7, 3), (5, 3), (3, 3, 3, 2))}


def test_numbers_do_not_change_with_versions_or_machines():
    """A saved adapter would not fit its base any more."""
    drawn = seeded_uniform(0, "layer.weight", (2, 2), 1 / 3)
    assert drawn.dtype == torch.float64
    assert drawn.flatten().tolist() == pytest.approx(FIRST, abs=0)
    form = get_parameterization("fedpara")
    halves = seeded_halves(5, "conv.weight", [SIZES[3, 2]] * 2, 0.5)
    assert base_digest(seeded_base(5, "conv.weight", 0.1, halves, form)) == DIGEST


def test_draws_depend_on_seed_and_name_alone():
    torch.manual_seed(3)
    one = seeded_uniform(1, "a", (4, 5), 2.0)
    torch.manual_seed(4)
    assert torch.equal(one, seeded_uniform(1, "a", (4, 5), 2.0))
    assert not torch.equal(one, seeded_uniform(2, "a", (4, 5), 2.0))
    assert not torch.equal(one, seeded_uniform(1, "b", (4, 5), 2.0))
    many = seeded_uniform(1, "c", (400, 500), 2.0)
    assert float(many.var()) == pytest.approx(2.0, rel=0.02)
    assert abs(float(many.mean())) < 0.02
    assert float(many.abs().max()) <= math.sqrt(6)


@pytest.mark.parametrize("kernel", SIZES)
@pytest.mark.parametrize("name", ["fedpara", "lowrank", "pfedpara"])
def test_the_weight_begins_as_the_seeded_one(name, kernel):
    form = get_parameterization(name)
    halves = seeded_halves(5, "w", [SIZES[kernel]] * form.num_halves, 0.7, form.local_halves)
    base = seeded_base(5, "w", 0.1, halves, form)
    whole = base + compose(halves, name)
    expected = seeded_uniform(5, "w/base", (7, 5, *kernel), 0.1)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_order_of_sums_does_not_depend_on_threads(threads):
    form = get_parameterization("fedpara")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        halves = seeded_halves(9, "w", [((300, 20), (200, 20))] * 2, 0.4)
        assert base_digest(seeded_base(9, "w", 0.01, halves, form)) == LARGE
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("name", ["fedpara", "lowrank", "pfedpara"])
@pytest.mark.parametrize("wanted", [0.3, 3.0])
def test_one_step_moves_the_weight_by_the_response(name, kernel, wanted):
    """dW = -η Σ_f J_f J_fᵀ G: along G by the mean of that operator's diagonal."""
    form, r, m, n = get_parameterization(name), 4, 40, 30
    at_zero = form.local_halves
    std = form.std_for_response(wanted, r, kernel=bool(kernel), at_zero=at_zero)
    assert form.response(r, std, kernel=bool(kernel), at_zero=at_zero) == pytest.approx(wanted)
    found = []
    for draw in range(60):
        sizes = ((m, r), (n, r), *(((r, r, *kernel),) if kernel else ()))
        halves = seeded_halves(draw, "w", [sizes] * form.num_halves, std, at_zero)
        factors = [f.requires_grad_() for h in halves for f in h.tensors()]
        gradient = torch.randn(m, n, *kernel, dtype=torch.float64)
        steps = torch.autograd.grad(compose(halves, name), factors, gradient)
        moved = sum(float(step.square().sum()) for step in steps)  # <G, Σ J Jᵀ G>
        found.append(moved / float(gradient.square().sum()))
    assert sum(found) / len(found) == pytest.approx(wanted, rel=0.15)


def test_response_by_hand():
    assert get_parameterization("fedpara").response(8, 0.5, kernel=False) == pytest.approx(
        4 * 64 * 0.5**6
    )
    assert get_parameterization("lowrank").response(8, 0.5, kernel=True) == pytest.approx(
        3 * 64 * 0.5**4
    )
    half = [Half(torch.ones(2, 1), torch.ones(2, 1))]
    assert torch.equal(compose(half, "lowrank"), torch.ones(2, 2))
