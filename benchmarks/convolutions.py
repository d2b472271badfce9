"""Adapters on frozen convolutions and on a whole small Llama, beside PEFT's LoRA and LoHa.

    python benchmarks/convolutions.py [--seconds 2]

One step is forward and backward. Convolutions: 3x3, batch 8, 16x16 pixels; Prop. 3 for FedPara and
LoHa (`use_effective_conv2d=True`); LoRA of rank 2r. PEFT 0.21's LoHa returns wrong gradients there
(tests/tuner/test_layers.py checks ours); its time is what counts here. Llama: six layers of 768,
random weights, all linear layers adapted, 4 x 128 tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import bytes_kept, paired, ratio
from peers import adapt
from report import table, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

KINDS = ("fedpara", "lora", "loha")


def measure(
    name: str,
    models: dict[str, nn.Module],
    run: Callable[[nn.Module], torch.Tensor],
    seconds: float,
) -> dict[str, Any]:
    """Time forward and backward of all models in turn."""

    def step(model: nn.Module) -> Callable[[], None]:
        def once() -> None:
            model.zero_grad()
            run(model).backward()

        return once

    times = paired({kind: step(model) for kind, model in models.items()}, seconds)
    row: dict[str, Any] = {"case": name, "fedpara_ms": statistics.median(times["fedpara"])}
    for kind in models:
        if kind != "fedpara":
            row[f"fedpara/{kind}"] = ratio(times, "fedpara", kind)
    for kind in ("fedpara", "loha"):
        known = list(models[kind].parameters())
        row[f"{kind}_kept_bytes"] = bytes_kept(lambda kind=kind: run(models[kind]), known)  # type: ignore[misc]
    return row


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2.0, help="per method and case")
    options = parser.parse_args()
    rows = []
    for channels, r in ((64, 8), (320, 8), (320, 16), (640, 8)):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
        x = torch.randn(8, channels, 16, 16, requires_grad=True)
        models = {
            kind: adapt(kind, base, r, ["0"], std=0.02, kernel=True) for kind in ("frozen", *KINDS)
        }
        name = f"convolution {channels} channels, r = {r}"
        rows.append(measure(name, models, lambda m, x=x: m(x).square().sum(), options.seconds))  # type: ignore[misc]
        print(rows[-1], flush=True)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=6,
            num_attention_heads=12,
            vocab_size=2000,
        )
    )
    ids = torch.randint(0, 2000, (4, 128))
    models = {kind: adapt(kind, llama, 8, "all-linear", std=0.02) for kind in KINDS}
    rows.append(
        measure(
            "Llama, 6 x 768, r = 8, 512 tokens",
            models,
            lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss,
            4 * options.seconds,
        )
    )
    header = ["case", "ms", "of frozen", "of LoRA", "of LoHa", "kept, MB", "LoHa's"]
    lines = [
        [
            r["case"], f"{r['fedpara_ms']:.1f}",
            f"{r['fedpara/frozen']:.2f}" if "fedpara/frozen" in r else "-",
            f"{r['fedpara/lora']:.2f}", f"{r['fedpara/loha']:.2f}",
            f"{r['fedpara_kept_bytes'] / 1e6:.1f}", f"{r['loha_kept_bytes'] / 1e6:.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    write(
        "convolutions", "Adapters on convolutions and on a small Llama", table(header, lines), rows
    )


if __name__ == "__main__":
    main()
