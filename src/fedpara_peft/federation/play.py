"""One round, once: open → outcomes → close, counted as it goes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from ..comm.ledger import Ledger
from .arguments import FederatedArguments
from .backend import Backend
from .client.local import LocalTrainer
from .errors import RoundError
from .observers.measures import peak_memory_bytes, work_of
from .server.averaging import AveragingBias
from .server.opened import OpenRound
from .server.round import RoundServer
from .state import Outcome, Refused, RoundReport, ServerState


def play(
    opened: OpenRound,
    args: FederatedArguments,
    backend: Backend,
    rounds: RoundServer,
    local: LocalTrainer,
    ledger: Ledger,
    within: Callable[[Iterator[Outcome]], Iterator[Outcome]],
) -> tuple[ServerState, RoundReport]:
    """Send a round out, take in what comes back, and close it.

    Args:
        opened: the round.
        args: the run's settings.
        backend: where clients train.
        rounds: the server's half of a round.
        local: the model's tensors, live; they keep what the last client left.
        ledger: counts every transfer.
        within: hands outcomes on, and shows them.

    Returns:
        The server after the round, and the round's report, without metrics.

    Raises:
        RoundError: too few updates can be used, or all clients failed.
    """
    start, number = time.perf_counter(), opened.number + 1
    for client in backend.send(opened):
        ledger.record(number, client, "downlink", opened.size_to(client))
    bias = None
    if args.report_averaging_bias:
        bias = AveragingBias(local.model, local.shared, opened.server.params)
    came: set[int] = set()
    failed: list[Refused] = []
    sent: list[Outcome] = []
    for outcome in within(backend.outcomes(opened)):
        if outcome.reported:
            came.add(outcome.client)
        if outcome.size is not None:
            # Counts alone: a cohort's tensors need not all be held.
            sent.append(dataclasses.replace(outcome, update=None, sent=None, payload=b""))
            ledger.record(number, outcome.client, "uplink", outcome.size)
        if outcome.refused is not None:
            rounds.refuse(opened, outcome.refused)
            if outcome.refused.reason == "failed":
                failed.append(outcome.refused)
        elif outcome.update is not None:
            rounds.take_in(opened, outcome.update)
            if bias is not None:
                bias.add(outcome.update.update, rounds.weight(outcome.update))
    for client, direction, size in opened.updates.beside:
        ledger.record(number, client, direction, size)
    if failed and len(failed) == len(came):  # the fault is not one client's
        raise failed[0].error or RoundError(f"every client failed, first {failed[0].message}")
    ended, mean = rounds.close(opened)
    report = rounds.report(
        opened,
        ledger,
        time.perf_counter() - start,
        dropped=[client for client in opened.ended if client not in came],
        averaging_bias=None if bias is None else bias.result(mean.update, opened.server, ended),
        slowest_client_s=_slowest([outcome.seconds for outcome in sent]),
    )
    steps, terms = work_of(sent)
    peak = peak_memory_bytes(local.device)
    return ended, dataclasses.replace(
        report, local_steps=steps, terms=terms, peak_memory_bytes=peak
    )


def _slowest(times: Sequence[float | None]) -> float | None:
    """The slowest client's time; None where it was not measured."""
    known = [seconds for seconds in times if seconds is not None]
    return None if len(known) < len(times) else max(known, default=0.0)
