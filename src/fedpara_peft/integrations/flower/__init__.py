"""Federations of real machines, on Flower: ``server_app`` and ``client_app``.

Both reuse the parts of :class:`~fedpara_peft.FederatedTrainer`, so a run on real machines ends in
the same global model, bit for bit, as its simulation (on CPUs, with equally many threads).
"""

try:
    import flwr as _flwr  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fedpara_peft.integrations.flower needs Flower: pip install 'fedpara-peft[flower]'"
    ) from error

from ..engine.node import NodeSetup
from ..engine.server import ServerSetup
from .apps import client_app, server_app

__all__ = ["NodeSetup", "ServerSetup", "client_app", "server_app"]
