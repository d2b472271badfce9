"""One client after the other, or many side by side: which engine pays where.

    python benchmarks/engines.py [--quick] [--device cuda]

Small nets of all kinds, one epoch of eight batches a client (adapters of language models: two); one
thread. Runs of both engines in turn, medians of paired rounds' ratios.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from report import ask_device, table, write
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig

ROUNDS, REPEATS = 3, 3
WORDS = 512


class Case(NamedTuple):
    """A net, and the clients' data.

    Attributes:
        name: for the table.
        build: makes the net.
        client: makes a client's data.
        batch_size: rows of a batch.
        cohorts: numbers of clients to measure with.
    """

    name: str
    build: Callable[[], nn.Module]
    client: Callable[[], Any]
    batch_size: int
    cohorts: tuple[int, ...] = (10, 50)


class Reader(nn.Module):
    """Characters to the next one, by an LSTM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(80, 8), nn.LSTM(8, width, batch_first=True)
        self.head = nn.Linear(width, 80)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every position's next character."""
        scores: Tensor = self.head(self.lstm(self.embed(ids))[0])
        return scores


def mlp() -> nn.Module:
    """784-200-10."""
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def cnn() -> nn.Module:
    """Two convolutions and a classifier, for 28 × 28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(288, 10),
    )  # fmt: skip


def llama(layers: int, width: int) -> nn.Module:
    """A language model of 512 words."""
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=3 * width,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(build: Callable[[], nn.Module], config: PeftConfig | None) -> nn.Module:
    """A net with an adapter, if any."""
    torch.manual_seed(0)
    return build() if config is None else get_peft_model(build(), config)


def scratch(r: int, *targets: str) -> FedParaConfig:
    """FedPara in place of weights."""
    return FedParaConfig(r=r, base_weight="replaced", target_modules=[*targets])


def digits(*shape: int) -> TensorDataset:
    """Eight batches of ten."""
    return TensorDataset(torch.randn(80, *shape), torch.randint(10, (80,)))


def characters() -> TensorDataset:
    """Eight batches of eight lines of forty."""
    ids = torch.randint(80, (64, 41))
    return TensorDataset(ids[:, :-1], ids[:, 1:])


def text(length: int) -> list[dict[str, Tensor]]:
    """Two batches of four rows."""
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(WORDS, (8, length))]


def cases() -> list[Case]:
    """All that is measured."""
    found = []
    for r in (4, 8, 16):
        build = functools.partial(adapted, mlp, scratch(r, "0"))
        found.append(Case(f"MLP 784-200-10, FedPara, r = {r}", build, lambda: digits(784), 10))
    build = functools.partial(adapted, mlp, None)
    found.append(Case("MLP 784-200-10, dense", build, lambda: digits(784), 10))
    for name, config in {"FedPara, r = 4": scratch(4, "3", "7"), "dense": None}.items():
        build = functools.partial(adapted, cnn, config)
        found.append(Case(f"CNN of 8k values, {name}", build, lambda: digits(1, 28, 28), 10))
    for name, config in {"FedPara, r = 4": scratch(4, "lstm"), "dense": None}.items():
        build = functools.partial(adapted, functools.partial(Reader, 64), config)
        found.append(Case(f"LSTM 1 × 64, {name}", build, characters, 8))
    heads = ["q_proj", "v_proj"]
    for layers, width, length in ((2, 128, 32), (4, 256, 64), (6, 512, 64)):
        adapters = {
            "FedPara, r = 4": FedParaConfig(r=4, target_modules=heads),
            "LoRA, r = 8": LoraConfig(r=8, target_modules=heads),
        }
        for name, config in adapters.items():
            base = functools.partial(llama, layers, width)
            found.append(Case(
                f"Llama {layers} × {width}, {length} tokens, {name}",
                functools.partial(adapted, base, config), functools.partial(text, length), 4,
                (10, 50) if width < 256 else (10,),
            ))  # fmt: skip
    return found


def measure(case: Case, cohort: int, rounds: int) -> dict[str, Any]:
    """Both engines on the same work."""
    torch.manual_seed(0)
    data = [case.client() for _ in range(cohort)]

    def trainer(engine: str) -> FederatedTrainer:
        args = FederatedArguments(
            tempfile.mkdtemp(), num_rounds=rounds + 1, per_client_batch_size=case.batch_size,
            engine=engine, disable_tqdm=True,
        )  # fmt: skip
        return FederatedTrainer(case.build(), args, data)

    ratios, sequential = [], []
    for _ in range(REPEATS):
        runs = [trainer(engine).train() for engine in ("sequential", "batched")]
        pairs = list(zip(*([report.seconds for report in run] for run in runs), strict=True))
        for alone, stacked in pairs[1:]:  # the first round warms up
            ratios.append(stacked / alone)
            sequential.append(alone)
    automatic = trainer("auto")._simulation.stacked
    return {
        "model": case.name,
        "values": sum(p.numel() for p in case.build().parameters() if p.requires_grad),
        "cohort": cohort,
        "sequential_ms_per_client": 1e3 * statistics.median(sequential) / cohort,
        "batched_of_sequential": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "chosen": "batched" if automatic and automatic.wanted(cohort) else "sequential",
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a round of each, nothing written")
    ask_device(parser)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    todo = [(case, cohort) for case in cases() for cohort in case.cohorts]
    if options.quick:
        rows = [measure(case, 10, 1) for case, cohort in todo[::5]]
    else:
        rows = [measure(case, cohort, ROUNDS) for case, cohort in todo]
    lines = [
        [
            row["model"],
            f"{row['values']:,}",
            str(row["cohort"]),
            f"{row['sequential_ms_per_client']:.1f}",
            f"{row['batched_of_sequential']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
            row["chosen"],
        ]
        for row in rows
    ]
    header = [
        "model", "trained values", "clients a round", "sequential, ms a client",
        "batched, of sequential", "chosen by engine='auto'",
    ]  # fmt: skip
    if options.quick:
        print(table(header, lines))
    else:
        title = "Sequential and batched engine"
        write("engines", title, table(header, lines), rows, options.device)


if __name__ == "__main__":
    main()
