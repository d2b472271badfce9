"""The work that both speed apps do: models, examples, local steps."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedpara_peft import FedParaConfig

CLIENTS, EXAMPLES, BATCH, RATE = 2, 64, 16, 0.1


def small() -> nn.Module:
    """A net that is made in no time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    return get_peft_model(
        net, FedParaConfig(gamma=0.1, base_weight="replaced", target_modules=["0"])
    )


def large() -> nn.Module:
    """A transformer read from disk, adapted."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_pretrained(os.environ["BENCH_MODEL"])
    return get_peft_model(net, FedParaConfig(r=4, target_modules=["query", "value"]))


def small_data(client: int) -> Dataset:
    """Random examples."""
    rng = torch.Generator().manual_seed(client)
    inputs = torch.randn(EXAMPLES, 64, generator=rng)
    return TensorDataset(inputs, torch.randint(10, (EXAMPLES,), generator=rng))


def large_data(client: int) -> Dataset:
    """A few short random sentences: the step must not hide what is compared."""
    rng = torch.Generator().manual_seed(client)
    tokens = torch.randint(1000, (BATCH, 8), generator=rng)
    labels = torch.randint(2, (BATCH,), generator=rng)
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


MODELS = {"small": (small, small_data), "large": (large, large_data)}


def stamp(folder: str | Path, round: int) -> None:
    """Note when a round ended; round 0 is the beginning of the first."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "rounds.jsonl", "a") as file:
        file.write(json.dumps({"round": round, "time": time.time()}) + "\n")
