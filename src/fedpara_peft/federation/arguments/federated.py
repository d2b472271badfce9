"""``FederatedArguments``: the settings of a federated run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ...comm.codecs import Codec
from ..errors import ArgumentsError
from .checks import as_annotated, as_options, lies_in
from .late import LateArguments
from .local import LocalArguments
from .rounds import RoundArguments
from .schedule import share_of_rate
from .secure import SecureArguments, require_meaning
from .server import ServerArguments, require_bounded
from .watching import WatchingArguments

#: By interval as mathematicians write it, the arguments that lie in it (or are None).
_INTERVALS = {
    "[0, ∞)": ("num_rounds", "eval_every", "save_every", "weight_decay", "composed_weight_decay",
               "jacobian_correction", "dp_noise_multiplier", "seed", "warmup_rounds",
               "early_stopping_threshold", "max_staleness", "staleness_exponent",
               "client_seconds_sigma"),
    "[1, ∞)": ("num_local_epochs", "per_client_batch_size", "gradient_accumulation_steps",
               "eval_batch_size", "save_total_limit", "clients_per_round", "secure_max_examples",
               "early_stopping_patience", "buffer_size", "concurrency"),
    # A rate or a decay of 0 would freeze the model from the second round on, without a sign of it.
    "(0, ∞)": ("learning_rate", "factor_learning_rate", "learning_rate_decay", "max_grad_norm",
               "max_update_norm", "clip_update_norm", "secure_clip", "clip_learning_rate",
               "clip_count_std"),
    "(0, 1]": ("client_fraction",),
    "[0, 1]": ("quorum",),
    "[0, 1)": ("drop_out_probability", "momentum", "warmup_ratio", "unmask_drop_out_probability"),
    "[0, 0.5)": ("secure_drop_outs",),
    "(0, 1)": ("dp_delta", "clip_target_quantile"),
}  # fmt: skip
_CODECS = ("uplink_codec", "downlink_codec")
#: What None means, where it is more than «the default».
_NONE = {
    "max_update_norm": "None: unlimited",
    "clip_update_norm": "None: unlimited",
    "max_grad_norm": "None does not clip",
    "save_total_limit": "None keeps all",
    "early_stopping_patience": "None never stops early",
    "learning_rate_decay": "1 keeps the learning rate",
    "factor_learning_rate": "None: learning_rate",
    "max_staleness": "None: none is too old",
    "buffer_size": "None waits for the whole cohort",
}
#: What the optimizer's options are called here, for all optimizers.
_OWN_OPTIONS = {"lr": "learning_rate", "weight_decay": "weight_decay", "momentum": "momentum"}


# Fields come in the order of the bases from the last to the first: output_dir leads.
@dataclass
class FederatedArguments(
    LateArguments,
    WatchingArguments,
    SecureArguments,
    ServerArguments,
    LocalArguments,
    RoundArguments,
):
    """Settings of a federated run; ``HfArgumentParser`` reads them from a command line.

    Raises:
        ArgumentsError: an argument has a value, or meets another, that it cannot have.
    """

    def __post_init__(self) -> None:
        self.optim_args = options = as_options("optim_args", self.optim_args)
        as_annotated(self, dict.fromkeys(_CODECS, Codec))
        for interval, names in _INTERVALS.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not lies_in(value, interval):
                    hint = f"; {_NONE[name]}" if name in _NONE else ""
                    raise ArgumentsError(f"{name} must be in {interval}, got {value}{hint}")
        for entry in fields(self):
            value, choices = getattr(self, entry.name), entry.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ArgumentsError(f"{entry.name} must be one of {choices}, got {value!r}")
        if self.client_fraction is not None and self.clients_per_round is not None:
            raise ArgumentsError("give client_fraction or clients_per_round, not both")
        for name in ("concurrency", "max_staleness"):
            if getattr(self, name) is not None and self.buffer_size is None:
                raise ArgumentsError(
                    f"{name} is of rounds that do not wait for every client: give buffer_size too"
                )
        if self.concurrency is not None and (
            self.client_fraction is not None or self.clients_per_round is not None
        ):
            raise ArgumentsError(
                "give concurrency, client_fraction or clients_per_round: with buffer_size each "
                "says how many clients are at work at once"
            )
        require_bounded(self)
        if self.clip_target_quantile is not None:
            self._require_adaptive_possible()
        if self.client_weighting != "examples":
            self._require_weights()
        if self.exact_average:
            self._require_plain_mean()
        require_meaning(self, self.clip_update_norm, self.noise_mode)
        for option in (options or {}).keys() & _OWN_OPTIONS.keys():
            raise ArgumentsError(
                f"optim_args has {option!r}: give it as {_OWN_OPTIONS[option]}, which all "
                "optimizers share"
            )
        if self.warmup_rounds and self.warmup_ratio:
            raise ArgumentsError("give warmup_rounds or warmup_ratio, not both")
        if self.lr_scheduler_type != "constant" and 0 < self.num_rounds <= self._warmup:
            raise ArgumentsError(
                f"warmup_rounds={self.warmup_rounds} leaves nothing of num_rounds="
                f"{self.num_rounds} for lr_scheduler_type={self.lr_scheduler_type!r}: lower it"
            )
        if self.load_best_model_at_end or self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.metric_for_best_model and not self.eval_every:
            raise ArgumentsError(
                f"metric_for_best_model={self.metric_for_best_model!r} needs evaluations: "
                "eval_every must be above 0"
            )

    def described(self) -> dict[str, Any]:
        """All settings as JSON has them: a codec by its text."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {n: str(v) if isinstance(v, Codec) else v for n, v in values.items()}

    def cohort_size(self, population: int) -> int:
        """Clients sampled each round, or at work at once: at least one, all of them by default."""
        size = max(1, round((self.client_fraction or 1.0) * population))
        for name in ("clients_per_round", "concurrency"):
            if (given := getattr(self, name)) is not None:
                if given > population:
                    raise ArgumentsError(f"{name}={given}, but there are only {population} clients")
                size = given
        if self.buffer_size is not None and self.buffer_size > size:
            raise ArgumentsError(
                f"buffer_size={self.buffer_size}, but only {size} clients are at work at once: "
                "lower it, or raise concurrency"
            )
        return size

    def learning_rate_at(self, round: int, *, factors: bool = False) -> float:
        """Clients' learning rate in a round, counted from 0.

        Args:
            round: rounds completed.
            factors: that of FedPara's factors.
        """
        own = self.factor_learning_rate if factors else None
        rate = self.learning_rate if own is None else own
        share = share_of_rate(self.lr_scheduler_type, round, self._warmup, self.num_rounds)
        return rate * self.learning_rate_decay**round * share

    def _require_adaptive_possible(self) -> None:
        if self.clip_update_norm is None:
            raise ArgumentsError("clip_target_quantile needs clip_update_norm, to start from")
        for name in ("secure_aggregation", "buffer_size"):
            if value := getattr(self, name):
                raise ArgumentsError(
                    f"clip_target_quantile cannot have {name}={value!r}: the server must see "
                    "in the same round how many updates were clipped; leave one of them out"
                )

    def _require_weights(self) -> None:
        obstacles = {
            f"secure_max_examples={self.secure_max_examples}: it bounds a weight by examples": (
                self.secure_max_examples != 1
            )
        }
        if self.client_weighting == "tokens":
            obstacles |= {
                f"aggregation={self.aggregation!r}: it does not weigh": self.aggregation != "mean",
                "client_sampling='weighted': who is drawn by examples is averaged alike": (
                    self.client_sampling == "weighted"
                ),
                "dp_noise_multiplier: what one client can move is bounded where all weigh alike": (
                    bool(self.dp_noise_multiplier)
                ),
                "secure_aggregation: a weight must have a bound that is agreed on": (
                    self.secure_aggregation
                ),
            }
        if found := next((text for text, holds in obstacles.items() if holds), None):
            raise ArgumentsError(
                f"client_weighting={self.client_weighting!r} cannot have {found}; leave one out"
            )

    def _require_plain_mean(self) -> None:
        for name, plain, why in (
            ("aggregation", "mean", "no other aggregate is a mean of weights"),
            ("dp_noise_multiplier", 0.0, "every client's factors go to the others"),
            ("secure_aggregation", False, "the server makes it of every client's factors"),
            ("buffer_size", None, "a late client's weights are not of this round's"),
            ("factor_schedule", "all", "with one block the factors' mean is the weights' already"),
        ):
            if (value := getattr(self, name)) != plain:
                raise ArgumentsError(
                    f"exact_average cannot have {name}={value!r}: {why}; leave one of them out"
                )

    @property
    def noise_mode(self) -> str:
        """Who adds noise for privacy: ``dp_mode``; empty without noise."""
        return self.dp_mode if self.dp_noise_multiplier else ""

    @property
    def start_clip_norm(self) -> float | None:
        """The first round's clipping norm, where it follows the updates' norms."""
        return None if self.clip_target_quantile is None else self.clip_update_norm

    @property
    def schedule_rounds(self) -> int | None:
        """``num_rounds`` where rates depend on it, so that a resumed run may not change it."""
        fixed = self.lr_scheduler_type == "constant" and not self.warmup_ratio
        return None if fixed else self.num_rounds

    @property
    def _warmup(self) -> int:
        return self.warmup_rounds or math.ceil(self.warmup_ratio * self.num_rounds)
