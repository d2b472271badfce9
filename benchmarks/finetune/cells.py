"""What is fine-tuned: texts, adapters, and how large the runs are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoHaConfig, LoraConfig
from pool import key_of

from fedpara_peft import FedParaConfig

RESULTS = Path(__file__).parents[1] / "results" / "finetune"
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # no table uses it
TEXTS = ("stdlib", "shakespeare")


@dataclass(frozen=True)
class Scale:
    """How large the runs are.

    Attributes:
        length: tokens of an example.
        examples: of a client, at most; a fifth of its text, after them, is held out.
        r: inner rank; LoRA's is 2r, for the same number of parameters.
        mixed_precision: of the arithmetic.
    """

    num_clients: int
    clients_per_round: int
    num_rounds: int
    tuning_rounds: int
    num_local_epochs: int
    batch_size: int
    length: int
    examples: int
    r: int
    mixed_precision: str
    targets: str | tuple[str, ...] = "all-linear"


SCALES = {
    "gpu": Scale(20, 4, 10, 5, 2, 16, 128, 64, 4, "bf16"),
    "cpu": Scale(20, 4, 6, 4, 1, 8, 64, 24, 4, "bf16"),
    "toy": Scale(2, 1, 3, 2, 1, 4, 32, 8, 2, "no"),
}
#: Rates that tuning begins with; LoRA's usual ones are among AdamW's.
GRIDS = {"adamw": (3e-4, 1e-3, 3e-3), "sgd": (0.1, 0.3, 1.0)}
#: Of the ways to federate, about what the plain one takes.
WAYS_GRID = (3e-3, 1e-2, 3e-2)

ZERO_Y = " with Y₂ = 0 for X₂"
EQUAL = "FedPara, factors of one variance"
#: A configuration for a rank and targets, by the adapter's name. The first trains nothing; those
#: with a start of this benchmark's own (see ``starts.py``) come last.
ADAPTERS: dict[str, Any] = {
    "frozen": None,
    "LoRA": lambda r, t: LoraConfig(r=2 * r, lora_alpha=2 * r, target_modules=t),
    "FedPara": lambda r, t: _fedpara(r, t),
    "LoHa": lambda r, t: LoHaConfig(r=r, alpha=r, target_modules=t),
    "rsLoRA": lambda r, t: LoraConfig(r=2 * r, lora_alpha=2 * r, use_rslora=True, target_modules=t),
    "FedPara, rank-stabilized": lambda r, t: _fedpara(r, t, use_rslora=True),
    "FedPara, LoHa's start": lambda r, t: _fedpara(r, t, init_weights="loha"),
    "FedPara, LyCORIS's start": lambda r, t: _fedpara(r, t, init_weights="lycoris"),
    "FedPara, ABBA's start": lambda r, t: _fedpara(r, t, init_weights="abba"),
    EQUAL: lambda r, t: _fedpara(r, t),
    f"{EQUAL}, rank-stabilized": lambda r, t: _fedpara(r, t, use_rslora=True),
    f"FedPara, LyCORIS's start{ZERO_Y}": lambda r, t: _fedpara(r, t, init_weights="lycoris"),
    f"FedPara, ABBA's start{ZERO_Y}": lambda r, t: _fedpara(r, t, init_weights="abba"),
}
#: The plain way, at the rate that was tuned for LoRA.
LORAS_RATE = "at LoRA's rate"
#: Ways to federate an adapter, beside the plain one, each with the adapters it is tried with.
WAYS: dict[str, tuple[str, ...]] = {
    LORAS_RATE: ("FedPara",),
    "exact average": ("FedPara",),
    "ranks r/2, r, 2r": ("FedPara",),
    "int8": ("LoRA", "FedPara"),
    "int4": ("LoRA", "FedPara"),
    "one block": ("FedPara",),
}
CODECS = ("int8", "int4")
#: Ways whose rate was tuned for another row.
NOT_TUNED = (*CODECS, LORAS_RATE)
#: Those that are trained by plain SGD as well.
WITH_SGD = ("LoRA", "FedPara", "LoHa", EQUAL)


def _fedpara(r: int, targets: Any, **given: Any) -> FedParaConfig:
    return FedParaConfig(r=r, alpha=r, target_modules=targets, **given)


@dataclass(frozen=True)
class Tune:
    """One fine-tuning run.

    Attributes:
        text: ``"stdlib"``, where every client has a package of Python's standard library, or
            ``"shakespeare"``, where it has a role.
        way: how it is federated: ``"plain"``, or a name in :data:`WAYS`.
        adapter: its name in :data:`ADAPTERS`.
        rounds: None for the scale's.
        learning_rate: None for the one that tuning finds.
    """

    text: str
    adapter: str
    scale: str = "gpu"
    optim: str = "adamw"
    rounds: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    way: str = "plain"

    @property
    def arguments(self) -> dict[str, Any]:
        """What its way sets of ``FederatedArguments``."""
        return {
            "int8": {"uplink_codec": "int8"},
            "int4": {"uplink_codec": "int4"},
            "one block": {"factor_schedule": "one_block"},
            "exact average": {"exact_average": True},
        }.get(self.way, {})

    @property
    def r(self) -> int:
        """The global model's inner rank: that of its largest client."""
        return self.of.r * (2 if self.way.startswith("ranks") else 1)

    def ranks(self, clients: Sequence[Any]) -> dict[Any, int] | None:
        """Every client's rank, by its place: a half, the whole and twice the scale's r."""
        if not self.way.startswith("ranks"):
            return None
        each = (self.of.r // 2, self.of.r, 2 * self.of.r)
        return {name: each[i % 3] for i, name in enumerate(clients)}

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.adapter + (f", {self.way}" if self.way != "plain" else "") + f", {self.optim}"

    @property
    def of(self) -> Scale:
        """The scale's figures."""
        return SCALES[self.scale]

    @property
    def file(self) -> str:
        """Name of the file that has its result."""
        return f"{self.scale}-{self.text}"

    @property
    def grid(self) -> tuple[float, ...]:
        """Rates that tuning begins with."""
        if self.adapter == "frozen":
            return (1e-3,)
        return GRIDS[self.optim] if self.way in ("plain", *NOT_TUNED) else WAYS_GRID

    @property
    def grows(self) -> bool:
        """Tuning goes on beyond the ends of the grid."""
        return True

    def tuning(self, rates: Sequence[float]) -> list[Tune]:
        """Runs of another seed; codecs have the rate of the plain way, which may be LoRA's."""
        way = "plain" if self.way in NOT_TUNED else self.way
        adapter = "LoRA" if self.way == LORAS_RATE else self.adapter
        base = replace(
            self, adapter=adapter, seed=TUNING_SEED, rounds=self.of.tuning_rounds, way=way
        )
        return [replace(base, learning_rate=rate) for rate in rates]

    def key(self) -> str:
        """What tells it from all others: its settings that are not the defaults."""
        return key_of(self)

    def score(self, row: dict[str, Any]) -> float:
        """Less held-out loss is better; of a run that diverged nothing is good."""
        return -math.inf if row["diverged"] or row["loss"] is None else -row["loss"]


def wanted(scale: str, texts: Sequence[str], adapters: Sequence[str]) -> list[Tune]:
    """The runs of the tables, the most telling first; on a GPU, as long as those that tuned too."""
    lengths = (SCALES[scale].tuning_rounds, None) if scale == "gpu" else (None,)
    return [
        Tune(text, adapter, scale, optim, rounds, seed=seed)
        for rounds in lengths
        for optim in GRIDS
        for text in texts
        for adapter in adapters
        if optim == "adamw" or (adapter in WITH_SGD and rounds)
        for seed in (SEEDS if adapter != "frozen" else SEEDS[:1])
    ] + [
        Tune(text, adapter, scale, seed=seed, way=way)
        for text in texts
        for way, tried in WAYS.items()
        for adapter in tried
        if adapter in adapters
        for seed in SEEDS
    ]
