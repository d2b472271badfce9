"""Sampling the cohort of a round."""

from __future__ import annotations

from .random import numpy_generator


def sample_cohort(population: int, size: int, seed: int, round: int) -> list[int]:
    """Draw ``size`` of ``population`` clients uniformly without replacement, in ascending order."""
    drawn = numpy_generator(seed, round, "cohort").choice(population, size=size, replace=False)
    return sorted(int(client) for client in drawn)
