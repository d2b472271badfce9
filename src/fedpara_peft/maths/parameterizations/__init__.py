"""The parameterizations of a weight, by name: one file and one line here for each."""

from ..errors import RankError
from .base import Parameterization
from .fedpara import FEDPARA
from .lowrank import LOWRANK
from .pfedpara import PFEDPARA

#: The registry. What is put in here a configuration can name.
PARAMETERIZATIONS: dict[str, Parameterization] = {
    FEDPARA.name: FEDPARA,
    PFEDPARA.name: PFEDPARA,
    LOWRANK.name: LOWRANK,
}


def get_parameterization(name: str) -> Parameterization:
    """The parameterization of this name; raises :class:`RankError` where there is none."""
    if name not in PARAMETERIZATIONS:
        raise RankError(f"parameterization must be one of {(*PARAMETERIZATIONS,)}, got {name!r}")
    return PARAMETERIZATIONS[name]


__all__ = [
    "FEDPARA",
    "LOWRANK",
    "PARAMETERIZATIONS",
    "PFEDPARA",
    "Parameterization",
    "get_parameterization",
]
