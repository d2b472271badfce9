"""Fine-tune one cell."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from report import environment
from torch import Tensor, nn
from torch.nn import functional as F

from fedpara_peft import FederatedArguments, FederatedTrainer
from fedpara_peft.federation.errors import RoundError

from .base import load
from .cells import ADAPTERS, Tune
from .starts import start


def work(cell: Tune, folder: Path, source: str) -> dict[str, Any]:
    """Fine-tune, from the last checkpoint on if the run was interrupted.

    Args:
        cell: with a learning rate.
        folder: for its checkpoints.
        source: see :func:`~.base.prepare`, which has been called.

    Returns:
        Held-out loss (a mean over tokens) and bytes, by round too.
    """
    model, (clients, held_out) = load(source, cell.text, cell.of)
    of = cell.of
    rounds = of.num_rounds if cell.rounds is None else cell.rounds
    every = max(1, math.ceil(rounds / 5))
    assert cell.learning_rate is not None
    args = FederatedArguments(
        str(folder), num_rounds=0 if cell.adapter == "frozen" else rounds,
        clients_per_round=of.clients_per_round,
        num_local_epochs=of.num_local_epochs, per_client_batch_size=of.batch_size,
        learning_rate=cell.learning_rate, optim=cell.optim, max_grad_norm=1.0,
        lr_scheduler_type="linear", warmup_rounds=1,
        mixed_precision=of.mixed_precision, seed=cell.seed,
        eval_every=every, save_every=every, save_total_limit=1, eval_batch_size=2 * of.batch_size,
        disable_tqdm=True, **cell.arguments,
    )  # fmt: skip
    trainer = FederatedTrainer(
        adapted(model, cell), args, clients, held_out, compute_loss=loss,
        client_ranks=cell.ranks([*clients]),
    )  # fmt: skip
    diverged = False
    try:
        trainer.train(resume_from_checkpoint=True)
    except RoundError as error:
        print(f"diverged: {error}", flush=True)
        diverged = True
    found = trainer.evaluate()["eval_loss"]
    history = trainer.history
    where = environment()
    return {
        "loss": found if math.isfinite(found) else None,
        "diverged": diverged,
        "refused": sum(len(report.refused) for report in history),
        "train_loss": history[-1].train_loss if len(history) else None,
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "bytes": history.total_bytes,
        "curve": history.curve("eval_loss"),
        "examples": [sum(map(len, clients.values())), len(held_out)],
        "hardware": where["gpu"] or where["cpu"],
        "versions": {n: where[n] for n in ("python", "torch", "peft", "fedpara-peft")},
    }


def adapted(base: nn.Module, cell: Tune) -> nn.Module:
    """A copy of the frozen model with the cell's adapter; LoRA's as a stand-in where none is."""
    torch.manual_seed(cell.seed)
    targets = cell.of.targets
    make = ADAPTERS["LoRA" if cell.adapter == "frozen" else cell.adapter]
    config = make(cell.r, targets if isinstance(targets, str) else list(targets))
    config.task_type = "CAUSAL_LM"  # "all-linear" leaves the head out then
    model = get_peft_model(copy.deepcopy(base), config)
    start(model, cell.adapter)
    return model


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, None, int]:
    """Mean loss of the next tokens, and how many there are."""
    (ids,) = batch
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = ids[:, 1:]
    mean = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
    return mean, None, wanted.numel()
