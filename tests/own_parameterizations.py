"""Parameterizations that this package does not have, each declared as a user would."""

from fedpara_peft.maths.parameterizations import Parameterization

THREE = Parameterization(name="three", formula="W₁ ⊙ W₂ ⊙ W₃", terms=((0, 1, 2),), zero_halves=(2,))
#: One half, with itself. Var(W² + W) = 2 v² + v for a normal entry of variance v.
SQUARE = Parameterization(
    name="square",
    formula="W₁ ⊙ (W₁ + 1)",
    terms=((0, 0), (0,)),
    zero_halves=(0,),
    variances=lambda v, tanh: (((1 + 8 * v) ** 0.5 - 1) / 4,),
)
#: FedPara whose product each client scales by a half of its own.
PERSONAL = Parameterization(
    name="personal three",
    formula="W₁ ⊙ W₂ ⊙ (W₃ + 1), W₃ local",
    terms=((0, 1, 2), (0, 1)),
    zero_halves=(1, 2),
    local_halves=(2,),
    variances=lambda v, tanh: ((v / 2) ** 0.5, (v / 2) ** 0.5, 1.0),
)
OWN = {p.name: p for p in (THREE, SQUARE, PERSONAL)}


def by_hand(name, parts):
    """The weight of activated halves, spelt out."""
    if name == "three":
        return parts[0] * parts[1] * parts[2]
    if name == "square":
        return parts[0] ** 2 + parts[0]
    return parts[0] * parts[1] * (parts[2] + 1)
