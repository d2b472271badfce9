r"""A character LSTM on Shakespeare: every role of the plays is a client.

    python examples/lstm_shakespeare.py --output_dir outputs/lstm --smoke True
    python examples/lstm_shakespeare.py --output_dir outputs/lstm --data plays.txt
    python examples/lstm_shakespeare.py --output_dir outputs/lstm-iid --split iid \
        --data flwrlabs/shakespeare --num_clients 100 --client_fraction 0.16 --num_rounds 500

A text file of plays has a line ``NAME:`` before every speech. The last fifth of every role's text
is held out; the model shall predict each of its characters from those before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import load_dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset
from transformers import HfArgumentParser

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig, accuracy, partition

LENGTH = 80  # characters a window predicts


@dataclass
class TextArguments:
    """Data, its division, and the model."""

    data: str = field(
        default="flwrlabs/shakespeare", metadata={"help": "A text file of plays or a Hub data set."}
    )
    split: str = field(default="role", metadata={"choices": ["role", "iid"]})
    num_clients: int = field(default=40, metadata={"help": "Roles, those with most text."})
    method: str = field(default="fedpara", metadata={"choices": ["fedpara", "lowrank", "dense"]})
    gamma: float = field(
        default=0.0, metadata={"help": "Rank ratio; low-rank takes the rank of equal size."}
    )
    hidden: int = field(default=256, metadata={"help": "Width of the two recurrent layers."})
    smoke: bool = field(default=False, metadata={"help": "Small net, pages of Python's manual."})


class CharLSTM(nn.Module):
    """Characters are embedded, go through two recurrent layers, and the next ones are scored."""

    def __init__(self, characters: int, hidden: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 8)
        self.lstm = nn.LSTM(8, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, time, characters)."""
        return self.head(self.lstm(self.embed(ids))[0])


def load_windows(data: str, smoke: bool) -> dict[str, list[str]]:
    """For every role its text, cut into windows that overlap by one character."""
    if smoke:  # each page of the manual is a role
        return {name: windows(text[:12_000]) for name, text in topics.items()}
    if Path(data).is_file():
        roles: dict[str, str] = {}
        for speech in re.split(r"\n\s*\n", Path(data).read_text(encoding="utf-8")):
            name, colon, text = speech.strip().partition(":\n")
            if colon and "\n" not in name:
                roles[name] = roles.get(name, "") + text + "\n"
        return {name: windows(text) for name, text in roles.items()}
    try:
        rows = load_dataset(data, split="train")
    except Exception as error:
        raise SystemExit(
            f"cannot load {data!r} ({error}): give a text file of plays with --data, or try "
            "--smoke True, which needs no data set"
        ) from None
    found: dict[str, list[str]] = {}
    for name, x, y in zip(rows["character_id"], rows["x"], rows["y"], strict=True):
        found.setdefault(name, []).append(x + y)
    # A row begins one character after the last one: every 80th together have all the text.
    return {name: texts[::LENGTH] for name, texts in found.items()}


def windows(text: str) -> list[str]:
    """Pieces of 81 characters; the last of each is the first of the next."""
    return [text[i : i + LENGTH + 1] for i in range(0, len(text) - LENGTH, LENGTH)]


def split_roles(
    roles: dict[str, list[str]], text: TextArguments, seed: int
) -> tuple[list[Subset], Subset, int]:
    """The clients' windows, the held-out ones, and the number of characters there are."""
    largest = sorted(roles.values(), key=len, reverse=True)[: text.num_clients]
    if len(largest) < text.num_clients or len(largest[-1]) < 2:
        enough = sum(len(pieces) > 1 for pieces in roles.values())
        raise SystemExit(f"{enough} roles have enough text: give a smaller --num_clients")
    codes = {c: i for i, c in enumerate(sorted({c for p in largest for c in "".join(p)}))}
    ids = torch.tensor([[codes[c] for c in piece] for pieces in largest for piece in pieces])
    data = TensorDataset(ids[:, :-1], ids[:, 1:])
    clients, held_out, start = [], [], 0
    for pieces in largest:
        end = start + len(pieces)
        cut = end - max(1, len(pieces) // 5)
        clients.append(Subset(data, range(start, cut)))
        held_out += range(cut, end)
        start = end
    if text.split == "iid":
        everyone = Subset(data, [i for client in clients for i in client.indices])
        clients = partition(everyone, "iid", text.num_clients, seed)
    return clients, Subset(data, held_out), len(codes)


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all positions, and logits."""
    characters, following = batch
    logits = model(characters)
    return F.cross_entropy(logits.flatten(0, 1), following.flatten()), logits


def factorize(model: nn.Module, method: str, gamma: float) -> nn.Module:
    """Factorize the recurrent layers' matrices, the four gates stacked; the rest stays dense."""
    if method == "dense":
        return model
    config = FedParaConfig(
        gamma=gamma, parameterization=method, base_weight="replaced", target_modules=["lstm"]
    )
    return get_peft_model(model, config)


def main() -> None:
    """Train as the command line says."""
    parser = HfArgumentParser((TextArguments, FederatedArguments))
    parser.set_defaults(
        num_rounds=100, per_client_batch_size=10, learning_rate=4.0, max_grad_norm=5.0
    )
    text, args = parser.parse_args_into_dataclasses()
    if args.client_fraction is None and args.clients_per_round is None:
        args = replace(args, client_fraction=0.2)
    if text.smoke:
        text = replace(text, num_clients=2, hidden=64)
        args = replace(args, num_rounds=3, num_local_epochs=10, client_fraction=1.0,
                       clients_per_round=None, per_client_batch_size=5,
                       learning_rate=2.0)  # fmt: skip
    roles = load_windows(text.data, text.smoke)
    clients, held_out, characters = split_roles(roles, text, args.seed)
    torch.manual_seed(args.seed)
    model = CharLSTM(characters, text.hidden)
    dense = sum(p.numel() for p in model.parameters())
    model = factorize(model, text.method, text.gamma)
    trainer = FederatedTrainer(
        model, args, clients, held_out, compute_loss=loss, compute_metrics=accuracy
    )
    say = trainer.accelerator.print  # once, not from every process
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"the LSTM has {dense:,} parameters; {text.method} trains {count:,} ({count / dense:.0%})")
    history = trainer.train(resume_from_checkpoint=args.save_every > 0)
    found, sent = trainer.evaluate()["eval_accuracy"], history.total_bytes / 1e6
    say(f"next character: {found:.1%} right after {len(history)} rounds and {sent:,.1f} MB sent")
    if trainer.accelerator.is_main_process:
        trainer.save_model(f"{args.output_dir}/model")


if __name__ == "__main__":
    main()
