"""What a person sees of a run while it lasts: rounds, and clients within a long round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ...comm.ledger import shown_bytes
from ..state import Outcome, RoundReport

#: A round shorter than this shows no bar of its own.
_LONG_S = 2.0


class Progress:
    """Two bars: rounds, and the clients of the present one; tqdm tells the time that is left.

    Args:
        total: rounds of the run.
        done: rounds completed before.
        disable: show nothing.
    """

    def __init__(self, total: int, done: int, disable: bool) -> None:
        self._disable = disable
        self._sent = 0
        self._rounds = tqdm(total=total, initial=done, desc="round", disable=disable)

    def within(self, outcomes: Iterator[Outcome], total: int) -> Iterator[Outcome]:
        """Go through the clients of a round, with a bar of their own once it takes long."""
        with tqdm(
            total=total, desc="clients", unit="client", leave=False, delay=_LONG_S,
            disable=self._disable,
        ) as bar:  # fmt: skip
            terms, steps = 0.0, 0
            for outcome in outcomes:
                if not (self._disable or outcome.terms is None or outcome.steps is None):
                    terms, steps = terms + outcome.terms, steps + outcome.steps
                    bar.set_postfix(_work(bar, terms, steps), refresh=False)
                bar.update()
                yield outcome

    def show(self, reports: Sequence[RoundReport], sent: int) -> None:
        """A round is over.

        Args:
            reports: of all rounds.
            sent: bytes so far.
        """
        self._rounds.set_postfix(_facts(reports, sent), refresh=False)
        self._rounds.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._rounds.close()


@contextmanager
def progress(total: int, done: int, disable: bool) -> Iterator[Progress]:
    """Bars for a while; what is logged meanwhile goes above them and does not break their lines."""
    bars = Progress(total, done, disable)
    try:
        with nullcontext() if disable else logging_redirect_tqdm():
            yield bars
    finally:
        bars.close()


def _work(bar: tqdm, terms: float, steps: int) -> dict[str, str]:
    """What the present round's clients have done: steps a client, and terms a second."""
    shown = {"steps/client": f"{steps / (bar.n + 1):.3g}"}
    if (elapsed := bar.format_dict["elapsed"]) > 0:
        shown["terms/s"] = f"{terms / elapsed:,.0f}"  # examples, or tokens that count
    return shown


def _facts(reports: Sequence[RoundReport], sent: int) -> dict[str, str]:
    loss = reports[-1].train_loss
    shown = {"loss": "-" if loss is None else f"{loss:.3f}", "sent": shown_bytes(sent)}
    if reports[-1].terms_per_s is not None:
        shown["terms/s"] = f"{reports[-1].terms_per_s:,.0f}"
    metrics = next((r.metrics for r in reversed(reports) if r.metrics), {})
    for name in ("eval_accuracy", "client_accuracy_mean"):
        if name in metrics:
            shown["accuracy"] = f"{metrics[name]:.1%}"
    return shown
