"""Where no bars are: every round in a line."""

from __future__ import annotations

import logging

from ...comm.ledger import shown_bytes
from ..state import RoundReport


def tell_round(logger: logging.Logger, report: RoundReport, rounds: int) -> None:
    """Log a round, of so many."""
    loss = "-" if report.train_loss is None else f"{report.train_loss:.4f}"
    shown = "".join(f", {name} {value:.4f}" for name, value in report.metrics.items())
    if report.clock_s is not None:
        shown += f", clock {report.clock_s:.1f} s"
    if report.staleness_mean is not None:
        shown += f", staleness {report.staleness_mean:.1f}"
    lost = len(report.dropped) + len({client for client, _ in report.refused})
    logger.info(
        "round %d of %d: %d of %d clients, train_loss %s%s, %s, %.1f s",
        report.round, rounds, len(report.cohort) - lost, len(report.cohort), loss, shown,
        shown_bytes(report.uplink_bytes + report.downlink_bytes), report.seconds,
    )  # fmt: skip
