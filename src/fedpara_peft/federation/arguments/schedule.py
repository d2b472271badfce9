"""The course of the clients' learning rate: it follows from the arguments and the round alone."""

from __future__ import annotations

import math

#: What ``lr_scheduler_type`` may be.
SCHEDULES = ("constant", "linear", "cosine")


def share_of_rate(kind: str, round: int, warmup: int, rounds: int) -> float:
    """What of the learning rate a round has; never nothing, which would waste the round.

        (t + 1) / (W + 1)                       t < W, the warm-up
        1                                       constant
        (T - t) / (T - W)                       linear
        ½ (1 + cos π (t - W) / (T - W))         cosine

    Args:
        kind: one of :data:`SCHEDULES`.
        round: t, counted from 0.
        warmup: W.
        rounds: T.
    """
    if round < warmup:
        return (round + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    gone = (round - warmup) / (rounds - warmup)
    return 1 - gone if kind == "linear" else (1 + math.cos(math.pi * gone)) / 2
