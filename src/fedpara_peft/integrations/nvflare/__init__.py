"""Federations on NVIDIA FLARE: a controller, an executor, and the job that has both.

Both reuse the parts of :class:`~fedpara_peft.FederatedTrainer`, so a run over sites ends in the
same global model, bit for bit, as its simulation (on CPUs, with equally many threads).
"""

try:
    import nvflare as _nvflare  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fedpara_peft.integrations.nvflare needs NVIDIA FLARE: pip install 'fedpara-peft[nvflare]'"
    ) from error

from ..engine.node import NodeSetup
from ..engine.server import ServerSetup
from .controller import FedParaController
from .executor import FedParaExecutor
from .job import fedpara_job

__all__ = ["FedParaController", "FedParaExecutor", "NodeSetup", "ServerSetup", "fedpara_job"]
