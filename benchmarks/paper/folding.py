"""A prototype: every few rounds the factors' product goes into the base, and factors begin anew.

    W = B + P(θ) - P(θ₀)      for k rounds; then  B ← W,  θ₀ ← the next seed's draw,  θ ← θ₀

So the rank of what was learnt adds up while the bytes of a round stay the same. A base that is
drawn from a seed costs nothing to send; this one does: a client that comes back must be told the
factors of every fold since it was here last, or the base itself where that is smaller. These bytes
are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import train
from torch import nn

from fedpara_peft.tuner.scope import factor_names

from cells import Cell  # isort: skip

#: After how many rounds the variants fold.
FOLDED = {"folded every 4 rounds": 4, "folded every 8 rounds": 8}


def work(cell: Cell, folder: Path, data: dict[str, str], alone: bool = True) -> dict[str, Any]:
    """Train any cell; see :func:`train.train`.

    Args:
        cell: with a learning rate.
        folder: for its checkpoints.
        data: where each task's data are.
        alone: whether times tell something: nothing else runs beside it.
    """
    every = FOLDED.get(cell.variant)
    found = train.train(cell, folder, data) if every is None else _parts(cell, folder, data, every)
    return {**found, **({} if alone else {"seconds": None, "turn_s": None}), **train.setting()}


def _parts(cell: Cell, folder: Path, data: dict[str, str], every: int) -> dict[str, Any]:
    """Train a seeded cell in parts of so many rounds, a fold between two of them."""
    task = train.build(cell, data)
    rounds = cell.of.num_rounds if cell.rounds is None else cell.rounds
    assert cell.learning_rate is not None
    model = train.factorize(copy.deepcopy(task.model), task.targets, cell, _seed(cell, 0))
    parts, diverged = [], False
    for begin in range(0, rounds, every):
        if begin:
            model = folded(model, task.targets, cell, _seed(cell, len(parts)))
        args = train.arguments(
            cell, folder / f"from-{begin}", num_rounds=min(every, rounds - begin),
            learning_rate=cell.learning_rate * cell.of.learning_rate_decay**begin,
            seed=_seed(cell, len(parts)),
        )  # fmt: skip
        trainer = train.trainer_of(cell, task, model, args)
        diverged = train.run(trainer)
        parts.append(list(trainer.history))
        if diverged:
            break
    factors = sum(p.numel() for n, p in model.named_parameters() if n in factor_names(model))
    dense = sum(task.model.get_submodule(name).weight.numel() for name in task.targets)
    extra = catching_up([[r.cohort for r in part] for part in parts], 4 * factors, 4 * dense)
    row = train.described(task, model, trainer.history, diverged)
    curve, sent, number = [], 0, 0
    for report, more in zip((r for part in parts for r in part), extra, strict=True):
        number, sent = number + 1, sent + report.uplink_bytes + report.downlink_bytes + more
        if task.metric in report.metrics:
            curve.append((number, sent, report.metrics[task.metric]))
    reports = [r for part in parts for r in part]
    return {**row, "bytes": sent, "curve": curve, **train.times(reports)}


def catching_up(
    cohorts: Sequence[Sequence[Sequence[Any]]], factor_bytes: int, base_bytes: int
) -> list[int]:
    """Bytes that tell every round's clients of the folds since they were here last.

    Args:
        cohorts: by part and round, the clients.
        factor_bytes: of the factors of one fold.
        base_bytes: of the whole base, which a client is sent instead where that is less.
    """
    seen: dict[Any, int] = {}
    extra = []
    for part, rounds in enumerate(cohorts):
        for cohort in rounds:
            extra.append(
                sum(min((part - seen.get(c, 0)) * factor_bytes, base_bytes) for c in cohort)
            )
            seen.update(dict.fromkeys(cohort, part))
    return extra


def folded(model: nn.Module, targets: list[str], cell: Cell, base_seed: int) -> nn.Module:
    """The same function with new factors: its weights are the base now."""
    dense = copy.deepcopy(model).merge_and_unload()
    weights = {name: _weights(dense.get_submodule(name)) for name in targets}
    new = train.factorize(dense, targets, cell, base_seed)
    composed = copy.deepcopy(new).merge_and_unload()
    with torch.no_grad():
        for name in targets:
            layer = new.get_base_model().get_submodule(name).get_base_layer()
            begins = _weights(composed.get_submodule(name))
            for weight, wanted in weights[name].items():
                getattr(layer, weight).add_(wanted - begins[weight])
    return new


def _weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in layer.named_parameters() if n.startswith("weight")}


def _seed(cell: Cell, part: int) -> int:
    return 1000 * (cell.seed + 1) + part
