"""``output_dir``: what a run finds there, and what it writes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from ...comm.ledger import Ledger
from ..arguments import FederatedArguments
from ..crew import Crew
from ..data.fingerprint import differences, shown_differences
from ..errors import ResumeError, RunFolderError
from .checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    remove_checkpoint,
    remove_partial,
    restore_replaced,
    save_checkpoint,
    write_model,
)
from .history import History
from .settings import SETTINGS_NAME, same_result, save_settings
from .store import CLIENTS

logger = logging.getLogger(__name__)

HISTORY_NAME, LEDGER_NAME = "history.json", "ledger.npy"
_LOCK_NAME = ".lock"
_MODELS = ("adapter_model.safetensors", "adapter_config.json", "model.safetensors")
#: Writing the history may take this share of a run's time.
_SHARE = 0.01


class RunFolder:
    """The folder of a run.

    Args:
        args: the run's settings.

    Attributes:
        saved: rounds of the checkpoints that are kept, in order.
    """

    def __init__(self, args: FederatedArguments) -> None:
        self._args = args
        self._path = Path(args.output_dir)
        self._facts: Mapping[str, Any] = {}
        self._best = 0
        self._written = (0.0, 0.0)  # when the history was, and how long it took
        self.saved: list[int] = []

    def begin(
        self,
        resume: bool | str | os.PathLike[str] | None,
        facts: Mapping[str, Any],
        described: Mapping[str, Any],
        crew: Crew,
    ) -> Checkpoint | None:
        """Find what to continue from, and make the folder ready.

        Args:
            resume: see :meth:`~..trainer.FederatedTrainer.train`.
            facts: what the run was given.
            described: the same for whoever reads the folder.
            crew: the processes that share it.

        Returns:
            The checkpoint; None to start afresh.

        Raises:
            ResumeError: it is of another run, or starting afresh would overwrite one.
        """
        self._facts = facts
        folder = crew.on_main(lambda: self._chosen(resume, described))
        loaded: list[Checkpoint] = []
        if folder is not None:
            crew.together(lambda: loaded.append(load_checkpoint(folder, facts)))
        number = loaded[0].server.round if loaded else 0
        self.saved = crew.on_main(lambda: self._ready(number))
        return loaded[0] if loaded else None

    @contextmanager
    def held(self, crew: Crew) -> Iterator[None]:
        """Keep other runs out of the folder; a killed process's hold ends with it.

        Args:
            crew: the processes that share it; the main one holds it for all.

        Raises:
            RunFolderError: a run that goes on has it, or it cannot be written.
        """
        lock = FileLock(self._path / _LOCK_NAME)
        crew.on_main(lambda: self._take(lock))
        try:
            yield
        finally:
            lock.release()

    def describe(self, described: Mapping[str, Any]) -> None:
        """Write ``settings.json``."""
        save_settings(self._path, dict(described))

    def save(self, checkpoint: Checkpoint, model: nn.Module, best: int) -> None:
        """Write a checkpoint and remove the oldest beyond ``save_total_limit``.

        Args:
            checkpoint: the run after a round.
            model: the global model.
            best: the best round so far, whose checkpoint stays; 0: none is.

        Raises:
            RunFolderError: it cannot be written.
        """
        after = self._kept(checkpoint.server.round, best)
        # The newest whole checkpoint and the best one stay while the next is written.
        staying = {*after, *self.saved[-1:], self._best}
        for number in self.saved:
            if number not in staying:
                remove_checkpoint(self._path / f"checkpoint-{number}")
        save_checkpoint(
            self._path, checkpoint, self._facts, lambda folder: write_model(model, folder)
        )
        for number in self.saved:
            if number in staying and number not in after:
                remove_checkpoint(self._path / f"checkpoint-{number}")

    def note_saved(self, number: int, best: int) -> None:
        """Know of a checkpoint that the main process wrote, and of the best round so far."""
        self.saved, self._best = self._kept(number, best), best

    def load(self, number: int) -> Checkpoint:
        """Read one of this run's checkpoints.

        Raises:
            ResumeError: it is damaged.
        """
        return load_checkpoint(self._path / f"checkpoint-{number}", self._facts)

    def write_history(self, history: History, ledger: Ledger, *, at_once: bool = False) -> None:
        """Write the history and the ledger, whole or not at all.

        After rounds of milliseconds this would take most of the time, so unless it must be done at
        once it waits until it is a small part of it.

        Raises:
            RunFolderError: they cannot be written.
        """
        when, took = self._written
        start = time.monotonic()
        if not at_once and start - when < took / _SHARE:
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            history.save(self._path / HISTORY_NAME)
            ledger.save(self._path / LEDGER_NAME)
        except OSError as error:
            raise RunFolderError(
                f"{self._path} cannot be written ({error.strerror or error}): make room; "
                f"{self.how_to_go_on()}"
            ) from error
        self._written = time.monotonic(), time.monotonic() - start

    def how_to_go_on(self) -> str:
        """What remains of an interrupted run."""
        if not self.saved:
            return (
                f"its history is in {self._path}; there is no checkpoint to continue from "
                "(save_every writes them)"
            )
        return (
            f"continue from checkpoint-{self.saved[-1]} in {self._path} with "
            "train(resume_from_checkpoint=True)"
        )

    def _take(self, lock: FileLock) -> None:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunFolderError(
                f"another run trains into {self._path}: wait for its end, or take another "
                "output_dir"
            ) from error
        except OSError as error:
            raise RunFolderError(
                f"{self._path} cannot be written ({error.strerror or error}): take another "
                "output_dir"
            ) from error

    def _kept(self, newest: int, best: int) -> list[int]:
        """Rounds of the checkpoints that stay with one more, in order.

        The newest and the best stay, also with a limit of 1.
        """
        limit = self._args.save_total_limit
        found = sorted({*self.saved, newest})
        if limit is None or len(found) <= limit:
            return found
        apart = {newest, *({best} & set(found))}
        others = [n for n in found if n not in apart]
        room = max(0, limit - len(apart))
        return sorted({*others[len(others) - room :], *apart})

    def _chosen(
        self, resume: bool | str | os.PathLike[str] | None, described: Mapping[str, Any]
    ) -> Path | None:
        """The checkpoint to continue from; an earlier run's folder is not overwritten unasked."""
        restore_replaced(self._path)
        found = checkpoints(self._path)
        if resume and resume is not True:
            if Path(resume).absolute().parent.resolve() != self._path.resolve():
                raise ResumeError(
                    f"{resume} is not in output_dir={self._path}, and what its clients keep lies "
                    "beside it: set output_dir to its folder, or to a copy of all of that"
                )
            return Path(resume)
        if resume and found:
            return list(found.values())[-1]
        if resume:
            logger.warning("no checkpoint in %s yet: starting afresh", self._path)
        if self._args.overwrite_output_dir:
            self._remove_run()
        elif found:
            raise ResumeError(
                f"{self._path} holds {list(found.values())[-1].name} of an earlier run: continue "
                "it with train(resume_from_checkpoint=True), take another output_dir, or set "
                "overwrite_output_dir=True"
            )
        elif (self._path / HISTORY_NAME).exists():
            self._refuse_another(described)
        return None

    def _refuse_another(self, described: Mapping[str, Any]) -> None:
        try:
            earlier = json.loads((self._path / SETTINGS_NAME).read_text())
        except (OSError, ValueError):
            earlier = {}
        differing = differences(
            same_result(earlier), json.loads(json.dumps(same_result(described)))
        )
        if differing:
            raise ResumeError(
                f"{self._path} holds the history of another run "
                f"({shown_differences(differing, 'then', 'now')}): take another output_dir, or set "
                "overwrite_output_dir=True"
            )

    def _remove_run(self) -> None:
        for path in checkpoints(self._path).values():
            remove_checkpoint(path)
        shutil.rmtree(self._path / CLIENTS, ignore_errors=True)
        for name in (HISTORY_NAME, LEDGER_NAME, SETTINGS_NAME, *_MODELS):
            (self._path / name).unlink(missing_ok=True)

    def _ready(self, number: int) -> list[int]:
        self._path.mkdir(parents=True, exist_ok=True)
        remove_partial(self._path)
        found = checkpoints(self._path)
        for newer in [n for n in found if n > number]:
            logger.warning("removing %s, newer than what is resumed", found.pop(newer))
            remove_checkpoint(self._path / f"checkpoint-{newer}")
        return list(found)
