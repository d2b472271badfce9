"""A site's half of a job: it trains its client, and answers with a payload."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from ...comm.errors import PayloadError
from ...federation.errors import ArgumentsError
from ..engine.jobs import Answer
from ..engine.node import Node, NodeSetup
from .messages import INTRODUCE, TRAIN, answer_message, introduction_message, read_job
from .named import made_by

logger = logging.getLogger(__name__)


class FedParaExecutor(Executor):
    """Trains the site's client whenever the controller asks for it.

    What the client keeps between rounds (pFedPara's local half, SCAFFOLD's control, residuals) is
    written to the site's folder and never leaves it.

    Args:
        node: ``"module:function"``; the function makes the
            :class:`~fedpara_peft.integrations.engine.node.NodeSetup` from ``config``.
        sites: the sites' names, the controller's own; client i is the i-th.
        config: what the function is given.
    """

    def __init__(
        self, node: str, sites: Sequence[str], config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.node = node
        self.sites = list(sites)
        self.config = dict(config or {})
        self._made: Node | None = None

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Introduce the site's client, or train it; FLARE calls this."""
        try:
            client = self._client(fl_ctx.get_identity_name())
            if task_name == INTRODUCE:
                return introduction_message(self._node().introduce(client))
            if task_name == TRAIN:
                return answer_message(self._train(client, shareable))
        except Exception:  # one client's fault: the others go on
            logger.exception("task %s failed", task_name)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def _train(self, client: int, message: Shareable) -> Answer:
        try:
            job = read_job(message)
        except PayloadError as error:
            return Answer(0, reason=error.reason, message=str(error))
        return self._node().train(client, job)

    def _node(self) -> Node:
        if self._made is None:
            self._made = Node(made_by(self.node, NodeSetup, self.config))
        return self._made

    def _client(self, site: str) -> int:
        if site not in self.sites:
            raise ArgumentsError(f"site {site!r} is none of the job's {self.sites}: name it there")
        return self.sites.index(site)
