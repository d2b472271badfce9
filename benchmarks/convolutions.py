"""Adapters on frozen convolutions and on a whole small Llama, beside PEFT's LoRA and LoHa.

    python benchmarks/convolutions.py [--quick] [--seconds 2] [--device cuda] [--compile]

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
from measure import bytes_kept, paired, peak_bytes, ratio
from peers import adapt
from report import ask_device, table, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

KINDS = ("frozen", "fedpara", "lora", "loha")


def measure(
    name: str,
    models: dict[str, nn.Module],
    x: torch.Tensor,
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    options: argparse.Namespace,
    seconds: float,
) -> dict[str, Any]:
    """Time forward and backward of all models in turn."""
    if options.compile:
        torch._dynamo.reset()
        for model in models.values():
            model.compile()

    def step(model: nn.Module) -> Callable[[], None]:
        def once() -> None:
            model.zero_grad()
            x.grad = None
            run(model, x).backward()

        return once

    times = paired({kind: step(model) for kind, model in models.items()}, seconds)
    row: dict[str, Any] = {"case": name, "fedpara_ms": statistics.median(times["fedpara"])}
    for kind in models:
        if kind != "fedpara":
            row[f"fedpara/{kind}"] = ratio(times, "fedpara", kind)
    for kind in ("fedpara", "loha"):
        known = [x, *models[kind].parameters()]
        row[f"{kind}_kept_bytes"] = bytes_kept(lambda kind=kind: run(models[kind], x), known)  # type: ignore[misc]
        row[f"{kind}_peak_bytes"] = peak_bytes(step(models[kind]), known)
    return row


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few cases, nothing written")
    parser.add_argument("--seconds", type=float, default=2.0, help="per method and case")
    ask_device(parser, compiles=True)
    options = parser.parse_args()
    rows = [*convolutions(options), llama(options)]
    header = [
        "case", "ms", "of frozen", "of LoRA", "of LoHa", "kept, MB (LoHa)", "peak, MB (LoHa)",
    ]  # fmt: skip
    lines = [
        [
            r["case"], f"{r['fedpara_ms']:.1f}", f"{r['fedpara/frozen']:.2f}",
            f"{r['fedpara/lora']:.2f}", f"{r['fedpara/loha']:.2f}",
            f"{r['fedpara_kept_bytes'] / 1e6:.1f} ({r['loha_kept_bytes'] / 1e6:.1f})",
            f"{r['fedpara_peak_bytes'] / 1e6:.1f} ({r['loha_peak_bytes'] / 1e6:.1f})",
        ]
        for r in rows
    ]  # fmt: skip
    if options.quick:
        print(table(header, lines))
    else:
        title = "Adapters on convolutions and on a small Llama"
        write("convolutions", title, table(header, lines), rows, options.device, options.compile)


def convolutions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Single layers."""
    rows = []
    cases = ((64, 8), (320, 8), (320, 16), (640, 8))
    for channels, r in cases[:1] if options.quick else cases:
        torch.manual_seed(0)
        with torch.device(options.device):
            base = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
            x = torch.randn(8, channels, 16, 16, requires_grad=True)
            models = {kind: adapt(kind, base, r, ["0"], std=0.02, kernel=True) for kind in KINDS}
        name = f"convolution {channels} channels, r = {r}"
        rows.append(
            measure(name, models, x, lambda m, x: m(x).square().sum(), options, options.seconds)
        )
        print(rows[-1], flush=True)
    return rows


def llama(options: argparse.Namespace) -> dict[str, Any]:
    """A whole model; it gives its inputs gradients, so that the frozen one has a backward pass."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=1 if options.quick else 6,
        num_attention_heads=12,
        vocab_size=2000,
    )
    with torch.device(options.device):
        base = LlamaForCausalLM(config)
        ids = torch.randint(0, 2000, (4, 128))
        models = {kind: adapt(kind, base, 8, "all-linear", std=0.02) for kind in KINDS}
        x = base.get_input_embeddings()(ids).detach().requires_grad_()
    name = f"Llama, {config.num_hidden_layers} x 768, r = 8, 512 tokens"
    return measure(
        name,
        models,
        x,
        lambda m, x: m(inputs_embeds=x, labels=ids, use_cache=False).loss,
        options,
        4 * options.seconds,
    )


if __name__ == "__main__":
    main()
