"""The composed weight gets the variance that was asked for."""

import pytest
import torch

from fedpara_peft import RankError
from fedpara_peft.maths.compose import Half, compose
from fedpara_peft.maths.starts.variances import (
    TANH_VARIANCE_CAP,
    factor_std,
    half_variances,
    identity_start_stds,
)


def draw(variance, name, tanh, r, kernel, m=96, n=64):
    halves = []
    for v in half_variances(variance, name, tanh):
        std = factor_std(v, r, kernel=bool(kernel), nonlinearity=tanh)
        t = std * torch.randn(r, r, *kernel, dtype=torch.float64) if kernel else None
        halves.append(
            Half(
                std * torch.randn(m, r, dtype=torch.float64),
                std * torch.randn(n, r, dtype=torch.float64),
                t,
            )
        )
    return compose(halves, name, tanh)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("r", [2, 8])
@pytest.mark.parametrize("variance", [0.01, 0.2])
@pytest.mark.parametrize(
    ("name", "tanh"),
    [
        ("fedpara", None),
        ("pfedpara", None),
        ("lowrank", None),
        ("fedpara", "tanh"),
        ("pfedpara", "tanh"),
    ],
)
def test_composed_variance(name, tanh, variance, r, kernel):
    """Entries of one draw share factors, so many draws; E[W²] is the law's, mean 0."""
    draws = [draw(variance, name, tanh, r, kernel) for _ in range(120)]
    second = sum(float(w.square().mean()) for w in draws) / len(draws)
    mean = sum(float(w.mean()) for w in draws) / len(draws)
    assert second == pytest.approx(variance, rel=0.15)
    assert abs(mean) < 0.05 * variance**0.5


def test_he_per_factor_would_be_far_too_small():
    """What the documented rule avoids: fan-in He on every factor of a 512x512 rank-23 layer."""
    r, n = 23, 512
    factors = [torch.randn(512, r) * (2 / n) ** 0.5 for _ in range(4)]
    w = compose([Half(factors[0], factors[1]), Half(factors[2], factors[3])])
    assert float(w.std()) < (2 / n) ** 0.5 / 14


def test_personal_half_starts_with_variance_b():
    assert half_variances(0.5, "pfedpara") == (0.25, 1.0)
    assert half_variances(0.1, "pfedpara", "tanh") == (0.08, TANH_VARIANCE_CAP)


def test_tanh_is_compensated_and_bounded():
    plain, compensated = factor_std(0.3, 4), factor_std(0.3, 4, nonlinearity="tanh")
    assert compensated > 1.1 * plain
    assert half_variances(4.0, "lowrank", "tanh") == (TANH_VARIANCE_CAP,)
    with pytest.raises(RankError, match=r"keeps \|W\| below 1"):
        factor_std(1.0, 4, nonlinearity="tanh")


def test_bad_variance():
    with pytest.raises(RankError, match="must be positive, got 0"):
        half_variances(0, "fedpara")


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("name", ["fedpara", "pfedpara", "lowrank"])
def test_first_step_of_an_identity_start(name, kernel):
    """One SGD step from ΔW = 0 moves ΔW by the documented multiple of the gradient, in the mean."""
    m, n, r = 60, 30, 4
    fan_in = n * (9 if kernel else 1)
    stds = identity_start_stds(r, fan_in, name, kernel=bool(kernel))
    ratios = []
    for _ in range(150):
        halves = []
        for index in range(1 if name == "lowrank" else 2):
            half = Half(
                torch.randn(m, r), torch.randn(n, r), torch.randn(r, r, *kernel) if kernel else None
            )
            half = Half(
                *(
                    None if f is None else s * f.double()
                    for f, s in zip(half, stds[index], strict=True)
                )
            )
            if index == (1 if name == "fedpara" else 0) or (name == "pfedpara" and index == 1):
                half.x.zero_()
            halves.append(half)
        factors = [f.requires_grad_() for h in halves for f in h.tensors()]
        gradient = torch.randn(m, n, *kernel, dtype=torch.float64)
        steps = torch.autograd.grad(compose(halves, name), factors, gradient)
        eta = 1e-6
        moved = iter([f - eta * g for f, g in zip(factors, steps, strict=True)])
        after = [Half(next(moved), next(moved), next(moved) if kernel else None) for _ in halves]
        step = -compose(after, name).detach() / eta
        ratios.append(float((step * gradient).sum() / gradient.square().sum()))
    expected = (2 if name == "fedpara" else 1) * r / (3 * fan_in)
    assert sum(ratios) / len(ratios) == pytest.approx(expected, rel=0.15)
