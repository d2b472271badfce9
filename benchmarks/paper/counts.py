"""Parameters and transfers that the paper states, counted on the models themselves.

    python benchmarks/paper/counts.py

Nothing is trained: the models are built, and what a client would send is encoded.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft import get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import char_lstm, mlp, vgg16
from report import table, write

from fedpara_peft import FederatedArguments, FedParaConfig, plan
from fedpara_peft.maths.rank import parameter_count, rank_for_ratio


def trained(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def factorized(model: nn.Module, gamma: float, method: str = "fedpara") -> nn.Module:
    """The model with replaced weights: all convolutions, recurrent layers or, of an MLP, all."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.LSTM)]
    names = names or [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    config = FedParaConfig(
        gamma=gamma, parameterization=method, base_weight="replaced", target_modules=names
    )
    return get_peft_model(model, config)


def layers() -> list[list[str]]:
    """Tab. 1 and the authors' notebook, by the formulas."""
    rows = [
        ["256 x 256 matrix, r = 16", 65_536, 16_384, parameter_count(16, 256, 256)],
        ["256 x 256 x 3 x 3 kernel, r = 16, Prop. 1", 589_824, 81_920,
         parameter_count(16, 256, 256 * 9)],
        ["256 x 256 x 3 x 3 kernel, r = 16, Prop. 3", 589_824, 20_992,
         parameter_count(16, 256, 256, 3)],
    ]  # fmt: skip
    notebook = {0.1: 60_192, 0.3: 178_050, 0.5: 296_434, 0.7: 414_792, 0.9: 533_192}
    for ratio, theirs in notebook.items():
        ours = parameter_count(rank_for_ratio(ratio, 256, 256, 3), 256, 256, 3)
        rows.append([f"the same, notebook's ratio {ratio}", 589_824, theirs, ours])
    return [[name, *(f"{n:,}" for n in counts)] for name, *counts in rows]


def shares() -> list[list[str]]:
    """Parameters of whole models; norms, biases and dense layers counted."""
    rows = []
    for name, build, method, gamma, theirs in (
        ("VGG16, 10 classes", vgg16, "fedpara", 0.1, "10.15"),
        ("VGG16, 10 classes", vgg16, "lowrank", 0.1, "10.25"),
        ("VGG16, 10 classes", vgg16, "fedpara", 0.4, "29.4"),
        ("VGG16, 10 classes", vgg16, "fedpara", 0.3, "21.8"),
        ("VGG16, 100 classes", lambda: vgg16(100), "fedpara", 0.4, "29.4"),
        ("LSTM, 80 characters", char_lstm, "fedpara", 0.0, "19"),
        ("LSTM, 80 characters", char_lstm, "lowrank", 0.0, "16"),
    ):
        dense, ours = trained(build()), trained(factorized(build(), gamma, method))
        rows.append([f"{name}: {method}, γ = {gamma:g}", f"{dense:,}", f"{ours:,}",
                     f"{ours / dense:.2%}", f"{theirs}%"])  # fmt: skip
    return rows


def transfers() -> list[list[str]]:
    """What one client of an MLP 784-256-62 (FEMNIST) sends, from encoded payloads."""
    args = FederatedArguments("unused", num_rounds=1)
    personal = FederatedArguments("unused", num_rounds=1, local_modules=["2"])
    sent = {
        "original": plan(mlp(62), args, 10),
        "FedPer": plan(mlp(62), personal, 10),
        "pFedPara, γ = 0.5": plan(factorized(mlp(62), 0.5, "pfedpara"), args, 10),
    }
    theirs = {"original": "1", "FedPer": "1.07", "pFedPara, γ = 0.5": "3.4"}
    first, per = sent["original"].uplink_bytes[0], sent["FedPer"].uplink_bytes[0]
    return [
        [name, f"{found.num_values:,}", f"{found.uplink_bytes[0]:,}",
         f"{first / found.uplink_bytes[0]:.2f}", f"{per / found.uplink_bytes[0]:.2f}", theirs[name]]
        for name, found in sent.items()
    ]  # fmt: skip


def main() -> None:
    """Count."""
    parts = {
        "Layers (Tab. 1 and the authors' notebook)": (
            ["layer", "dense", "the paper", "ours"], layers()),
        "Models": (
            ["model", "dense", "factorized", "share", "the paper's"], shares()),
        "Transfers for personal models": (
            ["what is shared of an MLP 784-256-62", "values", "bytes",
             "times fewer than the original", "than FedPer", "the paper's"], transfers()),
    }  # fmt: skip
    text = "\n\n".join(f"## {title}\n\n{table(*found)}" for title, found in parts.items())
    rows = [dict(zip(head, row, strict=True)) for head, found in parts.values() for row in found]
    write("paper/counts", "Parameters and transfers", text, rows)


if __name__ == "__main__":
    main()
