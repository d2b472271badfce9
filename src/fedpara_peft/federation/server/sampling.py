"""Who takes part in a round, and which process trains whom."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

import numpy as np

from ..random import numpy_generator


def sample_cohort(
    num_examples: Sequence[int],
    size: int,
    seed: int,
    round: int,
    sampling: str = "uniform",
    busy: Collection[int] = (),
) -> list[int]:
    """Draw clients, each at most once, in ascending order.

    Args:
        num_examples: examples of every client of the population.
        size: clients to draw; with ``"poisson"`` so many in expectation, and none is possible.
        seed: the run's seed.
        round: round number, counted from 0.
        sampling: ``"uniform"``, or ``"weighted"``: each draw in proportion to the examples of the
            clients that are left; or ``"poisson"``: each client by itself with probability
            ``size / population``.
        busy: clients that are at work, of whom none is drawn.
    """
    rng = numpy_generator(seed, round, "cohort")
    if sampling == "poisson":
        chance = size / len(num_examples)
        return [int(c) for c in np.flatnonzero(rng.random(len(num_examples)) < chance)]
    at_work = frozenset(busy)
    idle = [client for client in range(len(num_examples)) if client not in at_work]
    shares = None
    if sampling == "weighted":
        shares = np.asarray([num_examples[client] for client in idle], dtype=np.float64)
        shares = shares / shares.sum()
    drawn = rng.choice(len(idle), size=size, replace=False, p=shares)
    return sorted(idle[position] for position in drawn)


def drop_outs(cohort: Sequence[int], probability: float, seed: int, round: int) -> list[int]:
    """The clients of a cohort that will not report, each with this probability."""
    if probability == 0:
        return []
    draws = {c: numpy_generator(seed, round, c, "drop-out").random() for c in cohort}
    return [c for c in cohort if draws[c] < probability]


def share_out(
    clients: Sequence[int], num_examples: Sequence[int], num_processes: int
) -> dict[int, int]:
    """Give each client to a process: the largest first, always to the least loaded.

    Returns:
        Process index by client.
    """
    loads = [(0, process) for process in range(num_processes)]
    owners = {}
    for client in sorted(clients, key=lambda c: (-num_examples[c], c)):
        load, process = heapq.heappop(loads)
        owners[client] = process
        heapq.heappush(loads, (load + num_examples[client], process))
    return owners
