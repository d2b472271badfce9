"""What each way of applying a factorized weight costs, in counted operations."""

from __future__ import annotations

from typing import NamedTuple


class Costs(NamedTuple):
    """What is worth how many operations on a kind of device; measured, not derived.

    Passes beside the products are bound by memory, so they count for more than they compute.

    Attributes:
        weight_pass: to make or change an entry of a weight or of the form.
        large_weight_pass: the same for a weight of more than :data:`LARGE` entries.
        activation_pass: what the form has to add of an activation.
        launches: that the form has more and smaller steps than composing.
    """

    weight_pass: int
    large_weight_pass: int
    activation_pass: int
    launches: int


#: Memory of more than 32 MB is no allocator's of glibc: it comes fresh, page by page, every time.
LARGE = 1 << 23
#: Of a CPU with AVX-512, on one thread; ``benchmarks/ablations.py`` shows what they are worth.
PROCESSOR = Costs(96, 768, 96, 1 << 22)
#: Of an H100 in bfloat16, TF32 and float32; see ``benchmarks/gpu/cost_rule.py``.
ACCELERATOR = Costs(512, 512, 128, 1 << 34)
#: A kernel with a core is composed in as many steps as its form has.
ACCELERATOR_KERNELS = ACCELERATOR._replace(launches=0)


def operations(
    *,
    positions: int,
    dense: int,
    form: int,
    features: int,
    r: int,
    training: bool,
    joined: bool,
    costs: Costs,
) -> tuple[float, float]:
    """Operations of the low-rank form, and of composing the weight.

    Beyond those of the frozen base layer, for P positions, D = M N K entries of the weight,
    F = R (M + N) + R² K entries of the form; c, C (of a large weight), a and l are what the
    device's passes and launches cost:

        form       (6 P + 2 c) F + a P (M + N) + l                   training
                   (2 P + 2 c min(1, P / r)) F + a P (M + N) + l     inference; by rows, few P
        compose    (12 r + C) D  training,    (4 r + C) D  inference
                   + 2 P D  training,  + 0    inference    joined: one product with W₀ + ΔW
                   + 6 P D  training,  + 2 P D inference   otherwise

    Args:
        positions: rows that the weight multiplies (tokens; output pixels of a convolution).
        dense: D.
        form: F.
        features: M + N.
        r: inner rank.
        training: whether a backward pass follows.
        joined: whether the composed weight can be added to the base weight and applied with it.
        costs: the device's.
    """
    c, around = costs.weight_pass, costs.activation_pass * positions * features + costs.launches
    passes = costs.large_weight_pass if dense > LARGE else c
    if training:
        composing = (12 * r + passes) * dense + (2 if joined else 6) * positions * dense
        return (6 * positions + 2 * c) * form + around, composing
    composing = (4 * r + passes) * dense + (0 if joined else 2) * positions * dense
    return (2 * positions + 2 * c * min(1.0, positions / r)) * form + around, composing
