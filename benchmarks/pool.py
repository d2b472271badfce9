"""Training runs from one queue: rates are tuned first, results are lines of JSON, all goes on.

A *cell* is one training run. It is trained once and its result is a line in a file of JSON lines;
a run that was interrupted goes on with the first cell that has no line yet, and a cell that was
interrupted with its last checkpoint. A cell without a learning rate waits for its tuning: runs at
the rates of a grid, which grows at an end as long as the best rate lies there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

#: A cell and a folder for its checkpoints → what was found.
Work = Callable[[Any, Path], dict[str, Any]]
Row = dict[str, Any]
#: How often a grid may grow at either end.
_MOST_STEPS = 4


class Cell(Protocol):
    """One training run; a frozen dataclass."""

    learning_rate: float | None

    @property
    def file(self) -> str:
        """Name of the file that has its result."""

    @property
    def grid(self) -> tuple[float, ...]:
        """Rates that tuning begins with, ascending; a single one is not tuned."""

    @property
    def grows(self) -> bool:
        """Whether tuning goes on beyond the ends of the grid."""

    def tuning(self, rates: Sequence[float]) -> list[Self]:
        """Runs of another seed at these rates, whose best rate this cell takes."""

    def key(self) -> str:
        """What tells it from all others."""

    def score(self, row: Row) -> float:
        """How good a result is; more is better."""


C = TypeVar("C", bound=Cell)


def key_of(cell: Any) -> str:
    """The settings of a frozen dataclass that are not the defaults, as text."""
    given = {f.name: value for f in fields(cell) if (value := getattr(cell, f.name)) != f.default}
    return json.dumps(given, sort_keys=True)


class Results(Generic[C]):
    """The results of cells, by what they are.

    Args:
        folders: with files of JSON lines; new ones are added to those of the last.
        make: a cell from its fields.
    """

    def __init__(self, folders: Sequence[Path], make: Callable[..., C]) -> None:
        self.folder = folders[-1]
        self.found: dict[str, Row] = {}
        for folder in folders:
            for file in sorted(folder.glob("*.jsonl")):
                for line in whole_lines(file):
                    row = json.loads(line)
                    self.found[make(**row["cell"]).key()] = row

    def get(self, cell: C) -> Row | None:
        """Look a cell up; its rate is the tuned one if it has none of its own."""
        tuned = self.tuned(cell)
        return None if tuned is None else self.found.get(tuned.key())

    def tuned(self, cell: C) -> C | None:
        """Give the cell its learning rate; None while tuning is not finished."""
        if cell.learning_rate is not None:
            return cell
        if len(cell.grid) == 1:
            return replace(cell, learning_rate=cell.grid[0])
        _, best = self.tuning(cell)
        if best is None:
            return None
        return replace(cell, learning_rate=best.learning_rate)

    def tuning(self, cell: C) -> tuple[list[C], C | None]:
        """The runs that tune a cell's rate, as far as is known, and the best of them.

        The best is None as long as a run is missing, of the grid or beyond the end where the best
        lies.
        """
        rates, grown = list(cell.grid), [0, 0]
        while True:
            runs = cell.tuning(rates)
            rows = [self.found.get(run.key()) for run in runs]
            if None in rows:
                return runs, None
            scores = [cell.score(row) for row in rows if row is not None]
            best = scores.index(max(scores))
            end = {0: 0, len(runs) - 1: 1}.get(best)
            if end is None or not cell.grows or grown[end] == _MOST_STEPS:
                return runs, runs[best]
            grown[end] += 1
            rates = [_below(rates), *rates] if end == 0 else [*rates, _above(rates)]

    def add(self, cell: C, found: Row) -> None:
        """Write a result down at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"cell": asdict(cell), **found}
        with (self.folder / f"{cell.file}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.found[cell.key()] = row

    def next(self, cells: Iterable[C], busy: frozenset[str] = frozenset()) -> C | None:
        """The first cell to be trained now, what others wait for before them.

        Args:
            cells: wanted, the most telling first.
            busy: keys of those in training.
        """
        for cell in cells:
            tuned = self.tuned(cell)
            ready = [tuned] if tuned is not None else self.tuning(cell)[0]
            for one in ready:
                if one.key() not in self.found and one.key() not in busy:
                    return one
        return None


def whole_lines(file: Path) -> list[str]:
    """The lines of a file; what a killed process left of a last one is cut off."""
    text = file.read_text()
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text)
    return text.splitlines()


def _below(rates: Sequence[float]) -> float:
    """The next rate of a grid 1, 3, 10 …, or of one that doubles."""
    return _rounded(rates[0] / _ratio(rates[0], rates[1], up=False))


def _above(rates: Sequence[float]) -> float:
    return _rounded(rates[-1] * _ratio(rates[-2], rates[-1], up=True))


def _ratio(low: float, high: float, up: bool) -> float:
    """The step after (or before) one of a factor of 3 is one of 10/3, and the other way round."""
    ratio = high / low
    if ratio < 2.5:
        return ratio
    return 10 / ratio if 2.9 < ratio < 3.4 else ratio


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


@dataclass(frozen=True)
class Limits:
    """How much may be done at a time.

    Attributes:
        jobs: processes that train, one cell each.
        minutes: None for as long as it takes. What is in training then goes on another time.
        threads: of each process.
    """

    jobs: int = 1
    minutes: float | None = None
    threads: int = 1


def train_all(
    cells: Sequence[C], results: Results[C], work: Work, limits: Limits, checkpoints: Path
) -> list[str]:
    """Train what is missing, write each result down at once, and say so.

    Args:
        cells: wanted, the most telling first; those they wait for are found.
        results: what there is already.
        work: trains a cell; at the top level of a module, so that other processes find it.
        limits: jobs and time.
        checkpoints: folder for those of cells in training.

    Returns:
        Keys of the cells whose training raised an error, which is printed.
    """
    end = None if limits.minutes is None else time.monotonic() + 60 * limits.minutes
    failed: list[str] = []
    with _workers(limits, work) as workers:
        while True:
            busy = frozenset([*failed, *(w.cell.key() for w in workers if w.cell is not None)])
            idle = next((w for w in workers if w.cell is None), None)
            cell = None if idle is None else results.next(cells, busy)
            if idle is not None and cell is not None:
                idle.give(cell, checkpoints / name(cell))
                continue
            at_work = {w.pipe: w for w in workers if w.cell is not None}
            if not at_work:
                return failed
            ready = wait(list(at_work), None if end is None else max(0, end - time.monotonic()))
            if not ready:
                print(f"time is up; {len(at_work)} cells go on next time", flush=True)
                return failed
            for pipe in ready:
                assert isinstance(pipe, Connection)
                worker = at_work[pipe]
                done, found, seconds = worker.take()
                if isinstance(found, str):
                    failed.append(done.key())
                    print(f"FAILED {done.key()}\n{found}", flush=True)
                    continue
                results.add(done, found)
                shutil.rmtree(checkpoints / name(done), ignore_errors=True)
                score = done.score(found)
                print(f"{score:.4f} in {seconds:.0f} s: {done.key()}", flush=True)


def name(cell: Cell) -> str:
    """A folder's name for a cell."""
    return hashlib.blake2b(cell.key().encode(), digest_size=8).hexdigest()


class _Worker:
    """A process that trains one cell after the other."""

    def __init__(self, limits: Limits, work: Work) -> None:
        self._limits, self._work = limits, work
        self.cell: Any = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self._work, self._limits.threads), daemon=True
        )
        self.process.start()
        theirs.close()

    def give(self, cell: Any, folder: Path) -> None:
        self.cell, self._began = cell, time.monotonic()
        self.pipe.send((cell, folder))

    def take(self) -> tuple[Any, Row | str, float]:
        """The cell, its result or what went wrong, and the seconds that it took."""
        cell, self.cell = self.cell, None
        try:
            found = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            found = f"the process ended with code {self.process.exitcode}"
            self._start()
        return cell, found, time.monotonic() - self._began

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


@contextmanager
def _workers(limits: Limits, work: Work) -> Iterator[list[_Worker]]:
    os.environ["OMP_NUM_THREADS"] = str(limits.threads)  # of the processes to be started
    workers: list[_Worker] = []
    try:
        workers += [_Worker(limits, work) for _ in range(limits.jobs)]
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def _serve(pipe: Connection, work: Work, threads: int) -> None:
    """Train what comes; a cell's error is told, not raised."""
    torch.set_num_threads(threads)
    while True:
        try:
            cell, folder = pipe.recv()
        except EOFError:
            return
        try:
            found: Row | str = work(cell, folder)
        except Exception:
            found = traceback.format_exc()
        pipe.send(found)


def add_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """Options of a script that trains cells.

    Args:
        parser: the script's.
        out: where its results are kept.
    """
    parser.add_argument("--jobs", type=int, default=1, help="processes that train side by side")
    parser.add_argument("--minutes", type=float, help="stop then; the next call goes on")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--out", type=Path, default=out, help="folder for new results")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)


def given_limits(given: argparse.Namespace) -> Limits:
    """The limits of those options; the device holds for this process and those that it starts."""
    if given.device == "cpu":
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(given.threads)
    return Limits(given.jobs, given.minutes, given.threads)
