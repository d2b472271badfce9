"""What goes into a round and comes out of it, immutable; what is not here does not survive."""

from .client import (
    Broadcast,
    ClientState,
    ClientUpdate,
    CohortMean,
    Flight,
    LocalSteps,
    Outcome,
    Refused,
)
from .report import RoundReport
from .server import Remainders, ServerState, Terms, placed_like

__all__ = [
    "Broadcast",
    "ClientState",
    "ClientUpdate",
    "CohortMean",
    "Flight",
    "LocalSteps",
    "Outcome",
    "Refused",
    "Remainders",
    "RoundReport",
    "ServerState",
    "Terms",
    "placed_like",
]
