"""All tables and figures: for which tasks they are made at a scale, their cells and their text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import more
import tables
from cells import Cell, Results

_ALL = {"cpu": ("cifar10", "shakespeare"), "wide": ("cifar10", "shakespeare", "cifar10-vgg16"),
        "full": ("cifar10", "cifar100", "cinic10", "shakespeare")}  # fmt: skip
_TUNED = {scale: _ALL[scale] for scale in ("cpu", "wide")}  # the full scale has one rate only
_ONE = {"cpu": ("cifar10",), "full": ("cifar10",)}
_MORE = {"cpu": ("cifar10",), "wide": ("cifar10",)}


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Attributes:
        tasks: those it is made for, by scale.
        cells: its cells for a scale and task.
        show: Markdown of what was found; writes its picture too.
    """

    title: str
    tasks: dict[str, tuple[str, ...]]
    cells: Callable[[str, str], list[Cell]]
    show: Callable[[str, str, Results], str]


TABLES: dict[str, Table] = {
    "table2": Table("FedPara and low-rank at equal size (Tab. 2)", _ALL, tables.equal_size_cells,
                    tables.equal_size),
    "few": Table("Trained to the end", {"cpu": ("cifar10",)}, tables.few_cells, tables.few),
    "rates": Table("How much the learning rate matters", _TUNED, tables.rate_kinds, tables.rates),
    "figure3": Table("Accuracy for bytes sent (Fig. 3)", _ALL, tables.equal_size_cells,
                     tables.traffic),
    "figure5": Table("Personal models (Fig. 5)", {"cpu": ("mnist",), "full": ("mnist",)},
                     tables.personal_cells, tables.personal),
    "figure4": Table("Accuracy by rank ratio (Fig. 4)", _ONE, tables.gamma_cells, tables.gammas),
    "table3": Table("Strategies (Tab. 3)", _ONE, tables.strategy_cells, tables.strategies),
    "fedpaq": Table("Quantized uploads (FedPAQ)", _ONE, tables.codec_cells, tables.codecs),
    "ablations": Table("What each part is for", _ONE, tables.ablation_cells, tables.ablations),
    "unclipped": Table("Without clipping", {"cpu": ("shakespeare",)}, more.unclipped_cells,
                       more.unclipped),
    "optimizers": Table("Clients' optimizers",
                        {"cpu": ("cifar10",), "wide": ("cifar10", "shakespeare")},
                        more.all_seeds(more.optimizer_kinds), more.optimizers),
    "responses": Table("Seeded bases: response", _MORE, more.all_seeds(more.response_kinds),
                       more.responses),
    "decay": Table("Weight decay", _MORE, more.all_seeds(more.decay_kinds), more.decays),
    "folds": Table("Seeded bases: folds", _MORE, more.all_seeds(more.fold_kinds), more.folds),
}  # fmt: skip
