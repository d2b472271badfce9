"""Which way of applying a factorized weight is cheaper, from counted operations."""

from __future__ import annotations

#: Operations that an entry of a composed weight, or of the form's factors, costs in training beside
#: its products: elementwise passes are bound by memory, so they count for more than they compute.
#: Measured, not derived.
PASS_COST = 64
#: Operations that the form's many small launches are worth on an accelerator, where a linear layer
#: that composes has one product more than a plain one. Measured on an H100, not derived.
LAUNCH_COST = 1 << 33


def low_rank_form_is_cheaper(
    *, positions: int, dense: int, form: int, r: int, training: bool, joined: bool, launches: bool
) -> bool:
    """Whether to apply the low-rank form rather than to compose the weight.

    Operations beyond those of the frozen base layer, P positions, D = M N K entries of the weight,
    F = R (M + N) + R² K entries of the form:

        form       (6 P + c) F  training,    (2 P + c min(1, P / r)) F  inference (by rows, few P)
        compose    (16 r + c) D  training,    (4 r + c) D  inference
                   + 2 P D  training,  + 0    inference    joined: one product with W₀ + ΔW
                   + 6 P D  training,  + 2 P D inference   otherwise

    and for the form of a linear layer on an accelerator ``LAUNCH_COST``.

    Args:
        positions: rows that the weight multiplies (tokens; output pixels of a convolution).
        dense: D.
        form: F.
        r: inner rank.
        training: whether a backward pass follows.
        joined: whether the composed weight can be added to the base weight and applied with it.
        launches: whether the form pays for launching more work than composing does.
    """
    launching = LAUNCH_COST if launches else 0
    if training:
        composing = (16 * r + PASS_COST) * dense + (2 if joined else 6) * positions * dense
        return (6 * positions + PASS_COST) * form + launching <= composing
    composing = (4 * r + PASS_COST) * dense + (0 if joined else 2) * positions * dense
    return (2 * positions + PASS_COST * min(1.0, positions / r)) * form + launching <= composing
