"""The way to the sites: one task for each, heard as soon as it is answered or over."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from ...federation.errors import RoundError

logger = logging.getLogger(__name__)

_LOOK_S = 0.5  # how soon an abort is seen

#: What a site answered, by client; None: nothing that can be used.
Heard = tuple[int, Shareable | None]


class Sites:
    """The sites of a job; client i is the i-th of them.

    Args:
        controller: through which tasks go.
        fl_ctx: its context.
        abort: whether the job must stop.
        names: the sites' names.
    """

    def __init__(
        self, controller: Controller, fl_ctx: FLContext, abort: Signal, names: Sequence[str]
    ) -> None:
        self._controller = controller
        self._fl_ctx = fl_ctx
        self._abort = abort
        self.names = tuple(names)

    def ask(
        self, task: str, client: int, message: Shareable, heard: Callable[[Heard], None]
    ) -> Callable[[], None]:
        """Give a site a task, without waiting.

        Args:
            task: its name.
            client: whose site.
            message: what it is told.
            heard: called, from another thread, when the site has answered or the task is over.

        Returns:
            What takes the task back.
        """

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            result = client_task.result
            if (code := result.get_return_code()) != ReturnCode.OK:
                logger.warning("client %d (%s) failed: %s", client, self.names[client], code)
                result = None
            heard((client, result))

        def done(task: Task, fl_ctx: FLContext) -> None:  # also if nobody answered
            heard((client, None))

        made = Task(task, message, result_received_cb=received, task_done_cb=done)
        self._controller.broadcast(made, self._fl_ctx, targets=[self.names[client]])
        return lambda: self._controller.cancel_task(made, fl_ctx=self._fl_ctx)

    def heard(self, heard: queue.Queue[Heard], expected: set[int], end: float) -> Iterator[Heard]:
        """What these clients say first, as it comes, until the time is up.

        Args:
            heard: where :meth:`ask` puts it.
            expected: clients that were asked.
            end: when the time is up, by the monotonic clock.

        Raises:
            RoundError: the job was aborted.
        """
        silent = set(expected)
        while silent:
            if self._abort.triggered:
                raise RoundError("the job was aborted: submit it again, and it continues")
            left = end - time.monotonic()
            if left <= 0:
                return
            try:
                client, message = heard.get(timeout=min(_LOOK_S, left))
            except queue.Empty:
                continue
            if client in silent:
                silent.discard(client)
                yield client, message
