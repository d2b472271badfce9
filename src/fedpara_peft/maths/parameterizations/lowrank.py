"""The low-rank baseline: one half."""

from .base import Parameterization

LOWRANK = Parameterization(
    name="lowrank", formula="X Yᵀ, Tucker-2 for kernels", terms=((0,),), zero_halves=(0,)
)
