"""The best round so far, and whether it is time to stop: both follow from the reports alone.

A resumed run therefore finds them again in its checkpoint's history.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..arguments import FederatedArguments
from ..data.metrics import higher_is_better
from ..errors import ArgumentsError
from ..state import RoundReport


@dataclass(frozen=True)
class Best:
    """What ``metric_for_best_model`` was at its best, as transformers' ``Trainer`` judges it.

    Attributes:
        metric: its name; None: nothing is ever best.
        higher: whether more of it is better; None: its name tells.
        patience: ``early_stopping_patience``.
        threshold: ``early_stopping_threshold``.
        round: the best round; 0 before there is one.
        value: the metric then.
        waited: evaluations one after the other that were not better by more than the threshold.
    """

    metric: str | None
    higher: bool | None
    patience: int | None
    threshold: float
    round: int = 0
    value: float = math.nan
    waited: int = 0

    @classmethod
    def before(cls, args: FederatedArguments) -> Best:
        """Before the first round."""
        return cls(
            args.metric_for_best_model, args.greater_is_better, args.early_stopping_patience,
            args.early_stopping_threshold,
        )  # fmt: skip

    def after(self, report: RoundReport) -> Best:
        """With one more round; one that was not evaluated changes nothing.

        Raises:
            ArgumentsError: it was evaluated, and the metric is not among its numbers.
        """
        if self.metric is None or not report.metrics:
            return self
        name, value = self._found(report)
        if math.isnan(value):  # better than nothing it is not
            return replace(self, waited=self.waited + 1)
        if not self.round:
            return replace(self, round=report.round, value=value, waited=0)
        higher = higher_is_better(name) if self.higher is None else self.higher
        gain = value - self.value
        gain = gain if higher else -gain
        waited = 0 if gain > self.threshold else self.waited + 1
        if gain > 0:
            return replace(self, round=report.round, value=value, waited=waited)
        return replace(self, waited=waited)

    def after_all(self, reports: Iterable[RoundReport]) -> Best:
        """With several more rounds."""
        return functools.reduce(Best.after, reports, self)

    @property
    def is_final(self) -> bool:
        """Whether ``early_stopping_patience`` has run out."""
        return self.patience is not None and self.waited >= self.patience

    def _found(self, report: RoundReport) -> tuple[str, float]:
        asked = str(self.metric)
        for name in (asked, f"eval_{asked}", f"client_{asked}_mean"):
            if name in report.metrics:
                return name, report.metrics[name]
        raise ArgumentsError(
            f"metric_for_best_model={asked!r} is not among what round {report.round} was evaluated "
            f"by ({', '.join(report.metrics)}): name one of these, or let compute_metrics return it"
        )
