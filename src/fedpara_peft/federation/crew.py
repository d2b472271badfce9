"""The processes of a run: they begin alike, and end together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from .data.fingerprint import differences, shown_differences, tensor_digest
from .errors import AgreementError, RoundError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Crew:
    """The processes that ``accelerate launch`` started, one of them often.

    Args:
        accelerator: of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.size: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do something on every process; if it fails on one, it fails on all.

        Whoever waits for another that has stopped would wait for ever, so nothing that can fail on
        one process alone may be done otherwise.

        Returns:
            What each process found, in the order of the processes.

        Raises:
            RoundError: another process failed.
            Exception: the failure, on the process that met it.
        """
        if self.size == 1:
            return [work()]
        value, failure = None, None
        try:
            value = work()
        except Exception as error:
            failure = error
        text = f"{type(failure).__name__}: {failure}" if failure else None
        found = gather_object([(value, text)])
        if failure is not None:
            raise failure
        for index, (_, stopped) in enumerate(found):
            if stopped is not None:
                raise RoundError(f"process {index} stopped: {stopped}")
        return [part for part, _ in found]

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on the main process alone; all learn what it found, or that it failed."""
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def agree(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Compare what the processes were given.

        Args:
            facts: finds it out, by name; it may fail.

        Raises:
            AgreementError: on every process alike, if they were given different things.
        """
        found = self.together(lambda: dict(facts()))
        for index, theirs in enumerate(found):
            if differing := differences(found[0], theirs):
                shown = shown_differences(differing, "process 0", f"process {index}")
                raise AgreementError(
                    f"the processes were given different runs ({shown}): make everything alike in "
                    "all of them, by seeding what the script draws (torch.manual_seed, a generator "
                    "for random_split) before it builds model and data"
                )

    def share_model(self, model: nn.Module) -> None:
        """Give every process the first one's parameters and buffers, where theirs differ.

        Scripts that seed nothing build another model in every process.

        Raises:
            AgreementError: they are not of one architecture.
        """
        if self.size == 1:
            return
        tensors = {name: t.detach() for name, t in model.named_parameters()}
        tensors.update(model.named_buffers())
        trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
        shapes = {n: f"{tuple(t.shape)} {t.dtype}" for n, t in tensors.items()}
        self.agree(
            lambda: {
                "the model's tensors": shapes,
                "the model's trainable parameters": trained,
            }
        )
        digests = self.together(lambda: {n: tensor_digest(t) for n, t in tensors.items()})
        differing = [n for n in tensors if any(d[n] != digests[0][n] for d in digests)]
        if differing and self.is_main:
            logger.warning(
                "%d of the model's %d tensors were not the same in all processes (first %s): "
                "everyone takes those of process 0; seed the script to build one model",
                len(differing), len(tensors), differing[0],
            )  # fmt: skip
        with torch.no_grad():
            for name in differing:
                tensors[name].copy_(self.first(tensors[name]))

    def first(self, tensor: Tensor) -> Tensor:
        """The main process's tensor of this shape and dtype, as bytes so that any dtype travels."""
        data = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        return broadcast(data.view(torch.uint8)).view(tensor.dtype).view(tensor.shape)

    def share_threads(self) -> None:
        """Let every process use as many threads as the first: other counts give other bits."""
        count = self.together(torch.get_num_threads)[0]
        if count != torch.get_num_threads():
            logger.warning("using %d threads, as process 0 does", count)
            torch.set_num_threads(count)
