"""Where a run is told to from outside: TensorBoard, Weights & Biases and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers

from ..arguments import FederatedArguments
from ..errors import ArgumentsError
from ..folder.settings import published
from ..state import RoundReport


def wanted_trackers(args: FederatedArguments) -> list[str]:
    """The trackers that ``report_to`` names, as transformers understands it.

    Raises:
        ArgumentsError: there is none of a name, or it is not installed.
    """
    names = [name for name in args.report_to or () if name != "none"]
    available = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    for name in names:
        if name != "all" and name not in LOGGER_TYPE_TO_CLASS:
            raise ArgumentsError(
                f"report_to={name!r} is no tracker: there are {', '.join(LOGGER_TYPE_TO_CLASS)}, "
                "all and none"
            )
        if name != "all" and name not in available:
            raise ArgumentsError(f"report_to={name!r} is not installed: pip install {name}")
    return available if "all" in names else names


class Trackers:
    """The trackers of a run; nothing is written before :meth:`begin`.

    Args:
        accelerator: of this process.
        args: the run's settings.

    Raises:
        ArgumentsError: a tracker does not exist or is not installed.
    """

    def __init__(self, accelerator: Accelerator, args: FederatedArguments) -> None:
        self._accelerator = accelerator
        self._args = args
        self._names: Sequence[str] = wanted_trackers(args)

    def begin(self) -> None:
        """Open them; a run that could not start leaves no trace."""
        if self._names:
            self._accelerator.log_with = filter_trackers(list(self._names), self._args.output_dir)
            config = {
                name: value if isinstance(value, int | float | str | bool) else str(value)
                for name, value in published(self._args).items()
                if value is not None
            }
            self._accelerator.init_trackers("federated", config)

    def log(self, report: RoundReport) -> None:
        """Tell a round."""
        if self._names:
            self._accelerator.log(_numbers(report), step=report.round)

    def log_metrics(self, report: RoundReport) -> None:
        """Tell what a round that was told already has been evaluated by since."""
        if self._names:
            self._accelerator.log(dict(report.metrics), step=report.round)

    def end(self) -> None:
        """Close them; ``Accelerator.end_training`` would end the process group, too."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []


def _numbers(report: RoundReport) -> Mapping[str, Any]:
    values = {
        "train_loss": report.train_loss,
        **report.metrics,
        "uplink_bytes": report.uplink_bytes,
        "downlink_bytes": report.downlink_bytes,
        "refused": len(report.refused),
        "dropped": len(report.dropped),
        "seconds": report.seconds,
        "slowest_client_s": report.slowest_client_s,
        "clock_s": report.clock_s,
        "staleness_mean": report.staleness_mean,
        "staleness_max": report.staleness_max,
        "local_steps": report.local_steps,
        "terms_per_s": report.terms_per_s,
        "peak_memory_bytes": report.peak_memory_bytes,
        "averaging_bias": report.averaging_bias,
        "epsilon": report.epsilon,
        "clip_norm": report.clip_norm,
    }
    return {name: value for name, value in values.items() if value is not None}
