"""pFedPara: Sec. 2.3 of arXiv:2108.06098, with a personal half W₂."""

from .base import TANH_VARIANCE_CAP, Parameterization

#: Var W₂. W₂ learns from the gradient G ⊙ W₁, which is small because W₁ is, and by way of its
#: factors: as small as an ordinary weight they would leave the personal half all but still.
PERSONAL_VARIANCE = 1.0


def _variances(variance: float, tanh: bool) -> tuple[float, ...]:
    """``Var(W₁ ⊙ (W₂ + 1)) = Var W₁ (Var W₂ + 1)``."""
    personal = TANH_VARIANCE_CAP if tanh else PERSONAL_VARIANCE
    return variance / (1 + personal), personal


PFEDPARA = Parameterization(
    name="pfedpara",
    formula="W₁ ⊙ (W₂ + 1), W₂ local to the client",
    terms=((0, 1), (0,)),
    zero_halves=(0, 1),  # W₁ = 0 is the identity; W₂ = 0 is neutral
    local_halves=(1,),
    variances=_variances,
)
