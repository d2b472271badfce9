"""What is behind the differences, in words; every figure is read from the results."""

# ruff: noqa: E501  (prose with figures in it)

from __future__ import annotations

import statistics
from dataclasses import replace

from cells import DEFAULT_GAMMA, FAN_IN_HE, FEW_IMAGES, TUNING_SEED, Cell, Results
from tables import found

_CIFAR = Cell("cifar10", "cpu", "fedpara")


def why(results: Results) -> str:
    """The section of ``results/paper/claims.md`` after the claims."""
    gap = _mean(results, _low(_CIFAR, gamma=0.0)) - _mean(results, replace(_CIFAR, gamma=0.0))
    few = {m: _loss(results, m) for m in ("fedpara", "lowrank")}
    he = {m: _mean(results, replace(_CIFAR, method=m, variant=FAN_IN_HE))
          for m in ("fedpara", "lowrank")}  # fmt: skip
    roles = [100 * row["accuracy"] for row in found(
        results, Cell("shakespeare", "cpu", "fedpara", "role", DEFAULT_GAMMA["shakespeare"])
    )]  # fmt: skip
    dense = Cell("cifar10", "cpu", "dense")
    most = found(results, replace(_CIFAR, gamma=0.9), False)[0]
    first = found(results, dense, False)[0]
    deep = {m: _mean(results, Cell("cifar10-vgg16", "wide", m)) for m in _METHODS}
    return f"""
## What is behind the differences

**Width.** FedPara of a tenth of VGG16's size is {deep["fedpara"] - deep["lowrank"]:.1f} points ahead of low-rank of that size and
{deep["dense"] - deep["fedpara"]:.1f} behind dense; in nets of four convolutions the two are level. A factor of a tenth of a narrow layer is
short of parameters, whatever its rank; one of a wide layer is not, and there rank can bind.

**The start.** With a base drawn from a seed both begin as the dense net does, at no byte: FedPara's VGG16 is then
{deep["dense"] - deep["fedpara seeded"]:.1f} points behind dense, low-rank's {deep["dense"] - deep["lowrank seeded"]:.1f}. What FedPara leads by without it is in part that low-rank starts worse.

**FedPara and low-rank of equal size** are level in narrow nets. What was looked into:

- The rate. Each method's is tuned alike. A rate too high costs low-rank most: with 0.3 in place of 0.1 it loses
  {_loss_by_rate(results, "lowrank"):.1f} points on CIFAR-10, FedPara {_loss_by_rate(results, "fedpara"):.1f}. The paper has one rate for all.
- The initialization. Factors that start with He's fan-in variance each, so that a kernel's core moves faster than X and Y,
  take FedPara on CIFAR-10 from {_mean(results, _CIFAR):.1f} to {he["fedpara"]:.1f}%, low-rank from {_mean(results, _low(_CIFAR)):.1f} to {he["lowrank"]:.1f}%.
- The rank. At γ = 0 low-rank is {gap:.1f} points ahead; on so few images that both come to the end of what they can fit,
  its training loss is {few["lowrank"]:.3f} and FedPara's {few["fedpara"]:.3f}.
- Clipping. On Shakespeare gradients are mostly small and jump; clipped at a few times their usual norm, with a falling
  rate, FedPara's runs by role end at {min(roles):.1f} to {max(roles):.1f}%. By role the paper has the two methods level as well.

**FedPara and dense on CIFAR-10, narrow.** γ = 0.9 has {most["parameters"] / first["parameters"]:.0%} of the dense model's parameters and is
{100 * (first["accuracy"] - most["accuracy"]):.1f} points behind: after so few rounds it is the speed of training that is missing, not size.

**Strategies** have one setting each, not tuned, and two clients a round.

**The Jacobian correction** with λ = 1 learns nothing at this rate. The weight before a norm layer may have any size; there
it grows, and with it the penalty's gradient, until clipping leaves nothing of the loss's.

**Personal models.** W₂ learns from the gradient times W₁, which is small, and by way of its factors; started with the variance
of an ordinary weight it hardly moves, so it starts with variance 1. In the paper's words pFedPara is above all others
where data are plenty; a client with two classes needs nobody else for MNIST, so that local-only and FedPer have little left
to be improved there.
"""


_METHODS = ("dense", "fedpara", "lowrank", "fedpara seeded", "lowrank seeded")


def _low(cell: Cell, **more: float) -> Cell:
    return replace(cell, method="lowrank", **more)


def _mean(results: Results, cell: Cell) -> float:
    return 100 * statistics.mean(row["accuracy"] for row in found(results, cell))


def _loss(results: Results, method: str) -> float:
    cell = replace(_CIFAR, method=method, gamma=0.0, variant=FEW_IMAGES)
    return float(found(results, cell, False)[0]["train_loss"])


def _loss_by_rate(results: Results, method: str) -> float:
    """Points lost by a rate of 0.3 in place of 0.1, in the runs that tuned the rates."""
    runs = replace(_CIFAR, method=method, seed=TUNING_SEED).tuning((0.1, 0.3))
    right, high = (results.found[run.key()]["accuracy"] for run in runs)
    return 100 * float(right - high)
