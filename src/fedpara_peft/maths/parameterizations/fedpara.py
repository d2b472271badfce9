"""FedPara: Prop. 1 (matrices) and Prop. 3 (kernels) of arXiv:2108.06098."""

from .base import Parameterization

FEDPARA = Parameterization(name="fedpara", formula="W₁ ⊙ W₂", terms=((0, 1),), zero_halves=(1,))
