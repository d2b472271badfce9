"""The server's half of a job: the trainer's own run, as a workflow of NVIDIA FLARE."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from ...federation.errors import ArgumentsError
from ..engine.server import FederationServer, ServerSetup
from .backend import FlareBackend
from .named import made_by
from .sites import Sites

logger = logging.getLogger(__name__)


class FedParaController(Controller):
    """Runs all rounds with the sites of a job.

    Its arguments are plain values, because FLARE writes them into the job as JSON.

    Args:
        server: ``"module:function"``; the function makes the
            :class:`~fedpara_peft.integrations.engine.server.ServerSetup` from ``config``.
        sites: the sites' names; client i is the i-th.
        config: what the function is given.
        task_check_period: how often FLARE looks after its tasks, in seconds.
    """

    def __init__(
        self,
        server: str,
        sites: Sequence[str],
        config: Mapping[str, Any] | None = None,
        task_check_period: float = 0.1,
    ) -> None:
        super().__init__(task_check_period)
        self.server = server
        self.sites = list(sites)
        self.config = dict(config or {})
        self.task_check_period = task_check_period

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to do before the run."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run all rounds; an error ends the job, and is its reason."""
        try:
            self._run(Sites(self, fl_ctx, abort_signal, self.sites))
        except Exception as error:
            logger.exception("the run has stopped")
            notes = "; ".join(getattr(error, "__notes__", ()))
            self.system_panic(f"{type(error).__name__}: {error} {notes}".strip(), fl_ctx)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Take back what is still asked."""
        self.cancel_all_tasks(fl_ctx=fl_ctx)

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable,
        fl_ctx: FLContext,
    ) -> None:  # fmt: skip
        """A site answers when its round is over: nothing is used."""
        logger.warning("site %s answers %s too late: refused", client.name, task_name)

    def _run(self, sites: Sites) -> None:
        setup = made_by(self.server, ServerSetup, self.config)
        if setup.num_clients != len(sites.names):
            raise ArgumentsError(
                f"the setup has num_clients={setup.num_clients}, the job has {len(sites.names)} "
                "sites: every client is a site of its own"
            )
        if setup.args.buffer_size is not None:
            raise ArgumentsError(
                "buffer_size has no way through NVIDIA FLARE yet: its rounds wait for their "
                "cohort; use Flower or a simulation, or leave it out"
            )
        FederationServer(setup).run(
            lambda rounds, num_examples, expected: FlareBackend(
                sites, setup.args, rounds, num_examples, setup.deadline_s, expected
            ),
            logger,
        )
