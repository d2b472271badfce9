"""What is told of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        round: round number, counted from 1.
        cohort: the sampled clients, by name, as everywhere in a report; with ``buffer_size`` those
            whose turns ended in this round, whenever they began.
        dropped: those of them that did not report.
        refused: those whose update was not used, each with the reason.
        train_loss: mean over the clients that reported, by examples, or by tokens with
            ``client_weighting="tokens"``; None if none did.
        metrics: evaluation after the round, of the global model (``eval_…``) and over the clients'
            own models on their own data (``client_…_mean``, ``…_worst_decile``, ``…_std``; which
            tenth is the worst, :func:`~..data.metrics.higher_is_better` tells from the name); empty
            where none was made.
        client_metrics: every client's own numbers behind them, by metric and client; a client
            whose ``compute_metrics`` left a name out is not among its values, here or above.
        uplink_bytes: payloads from clients to the server.
        downlink_bytes: payloads from the server to clients.
        header_bytes: the part of both that is headers.
        averaging_bias: error of averaging factors instead of weights, relative to the mean update
            of the weights; None where it was not measured.
        epsilon: ε of differential privacy after this round; None without noise.
        clip_norm: what updates were clipped to, where it follows their norms.
        seconds: wall-clock time of the round, evaluation left out.
        slowest_client_s: training time of the slowest client that sent something, on the machine
            that simulated it (with the batched engine, an equal share of its stack's time); None
            where it was not measured.
        clock_s: the simulated time at its end, of a run with clients' seconds; None without.
        staleness_mean: mean over the updates that were used of the server's steps since they began;
            None where a round waits for its whole cohort, or used none.
        staleness_max: the most of them; likewise.
        local_steps: steps of the clients that sent something, together; None where nodes hide some.
        terms: what those steps' losses are means of, together: examples, or tokens that count.
        peak_memory_bytes: the most that this process, the main one, has held up to now: of the
            accelerator's memory, or without one of the machine's; None where it is not known.

    The last three are of the machine and the engine, so reports that differ in nothing else are
    equal.
    """

    round: int
    cohort: tuple[Any, ...]
    train_loss: float | None
    metrics: Mapping[str, float]
    uplink_bytes: int
    downlink_bytes: int
    header_bytes: int
    seconds: float
    dropped: tuple[Any, ...] = ()
    refused: tuple[tuple[Any, str], ...] = ()
    client_metrics: Mapping[str, Mapping[Any, float]] = field(default_factory=dict)
    averaging_bias: float | None = None
    epsilon: float | None = None
    clip_norm: float | None = None
    slowest_client_s: float | None = None
    clock_s: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None
    local_steps: int | None = field(default=None, compare=False)
    terms: float | None = field(default=None, compare=False)
    peak_memory_bytes: int | None = field(default=None, compare=False)

    @property
    def terms_per_s(self) -> float | None:
        """Examples, or tokens that count, trained on a second of the round's wall-clock time."""
        return None if self.terms is None or not self.seconds else self.terms / self.seconds
