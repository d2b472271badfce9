"""Which backend a trainer's settings ask for."""

from __future__ import annotations

from accelerate import Accelerator

from .arguments import FederatedArguments
from .backend import Backend
from .crew import Crew
from .errors import ArgumentsError
from .late.backend import LateClients
from .processes import Processes
from .secure.seal import Sealer
from .secure.simulation import SecureSimulation
from .server.round import RoundServer
from .simulation import Simulation
from .strategies import Strategy


def backend_of(
    args: FederatedArguments,
    strategy: Strategy,
    simulation: Simulation,
    rounds: RoundServer,
    accelerator: Accelerator,
    crew: Crew,
    sealer: Sealer | None,
) -> Backend:
    """The clients of a run: the simulation's, seen as its settings want them.

    Raises:
        ArgumentsError: no backend does all that is asked for.
    """
    if sealer is not None:
        return SecureSimulation(args, strategy, simulation, sealer)
    if args.buffer_size is not None and crew.size > 1:
        raise ArgumentsError(
            "buffer_size needs one process: what clients that are still at work have learnt is not "
            "shared"
        )
    if args.buffer_size is not None:
        return LateClients(simulation)
    return simulation if crew.size == 1 else Processes(simulation, rounds, accelerator, crew)
