"""A LoRA of rank k from FedPara's factors, beside PEFT's own conversion in the same run.

    python benchmarks/truncation.py [--layers 16] [--size 2048] [--rank 32] [--r 8 16 32]
    python benchmarks/truncation.py --errors      # what each rank loses; no times, seconds

The model is a stack of layers with seven square linears each, as a language model's have them, at
random factors. PEFT composes each weight and takes its dense singular value decomposition; here it
is that of the factors' r² x r² product. Both write their folders; the errors are of what is in the
files, against the exact weights in float64. Memory is the peak of tensors for one layer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from measure import PeakTensorBytes
from peft import get_peft_model
from report import table, write
from safetensors.torch import load_file
from torch import nn

from fedpara_peft import FedParaConfig, FedParaLayer, save_as_lora
from fedpara_peft.maths.apply import low_rank_form
from fedpara_peft.maths.approximation.truncate import singular_values
from fedpara_peft.maths.halves import Half

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(layers: int, size: int, r: int) -> Any:
    """The stack with adapters; its frozen weights are one tensor, for they are not looked at."""
    torch.manual_seed(0)
    shared = nn.Parameter(torch.zeros(size, size), requires_grad=False)
    stack = nn.ModuleList()
    for _ in range(layers):
        block = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in LINEARS})
        for linear in block.values():
            linear.weight, linear.in_features, linear.out_features = shared, size, size
        stack.append(block)
    model = get_peft_model(stack, FedParaConfig(r=r, target_modules=list(LINEARS)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model


@torch.no_grad()
def errors(model: Any, folder: Path, most: int = 7) -> list[float]:
    """Relative error of the LoRA in a folder, for the first few linears."""
    state, found = load_file(folder / "adapter_model.safetensors"), []
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, FedParaLayer))
    for name, layer in list(layers)[:most]:
        weight = layer.get_delta_weight("default").double()
        up, down = (state[f"{name}.lora_{one}.weight"].double() for one in "BA")
        found.append(float((weight - up @ down).norm() / weight.norm()))
    return found


#: Ranks that LoRA servers are built for.
LIMITS = (8, 16, 32, 64, 128, 256, 320, 512)


def lost(size: int, write_it: bool) -> None:
    """The error of the best LoRA at each limit, for random factors: the worst there is."""
    rows, lines = [], []
    for r in (2, 4, 8, 16, 22, 32):
        torch.manual_seed(0)
        halves = [Half(*(torch.randn(size, r, dtype=torch.float64) for _ in "xy")) for _ in "12"]
        squares = singular_values(low_rank_form(halves, "fedpara")).square()
        errors = {k: float((squares[k:].sum() / squares.sum()).sqrt()) for k in LIMITS}
        rows.append({"r": r, "exact rank": r * r, "size": size, "errors": errors})
        shown = ["exact" if k >= r * r else f"{error:.2f}" for k, error in errors.items()]
        lines.append([str(r), str(r * r), *shown])
    text = table(["r", "exact rank", *(f"rank {k}" for k in LIMITS)], lines)
    text += (
        "\n\nRelative Frobenius errors. Factors are Gaussian: a flat spectrum, that of no training."
    )
    if write_it:
        write("truncation_errors", f"What a LoRA of a rank loses, {size} x {size}", text, rows)
    else:
        print(text)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--r", type=int, nargs="+", default=[8, 16, 32], help="of FedPara")
    parser.add_argument("--quick", action="store_true", help="nothing written")
    parser.add_argument("--errors", action="store_true", help="the errors alone")
    options = parser.parse_args()
    lost(options.size, not options.quick)
    if options.errors:
        return
    rows, lines = [], []
    for r in options.r:
        model, one = (build(n, options.size, r) for n in (options.layers, 1))
        with tempfile.TemporaryDirectory() as temporary:
            ours, theirs = Path(temporary, "ours"), Path(temporary, "theirs")
            save_as_lora(one, Path(temporary, "warm"), rank=options.rank)
            start = time.perf_counter()
            save_as_lora(model, ours, rank=options.rank)
            between = time.perf_counter()
            peft.save_as_lora(theirs, model, options.rank)
            end = time.perf_counter()
            row = {
                "r": r,
                "exact rank": r * r,
                "rank": options.rank,
                "linears": options.layers * len(LINEARS),
                "size": options.size,
                "ours_s": between - start,
                "peft_s": end - between,
                "ours_error": max(errors(model, ours)),
                "peft_error": max(errors(model, theirs)),
            }
            with PeakTensorBytes() as counter:
                save_as_lora(one, Path(temporary, "a"), rank=options.rank)
            row["ours_peak_bytes"] = counter.peak
            with PeakTensorBytes() as counter:
                peft.save_as_lora(Path(temporary, "b"), one, options.rank)
            row["peft_peak_bytes"] = counter.peak
        row["peft/ours"] = row["peft_s"] / row["ours_s"]
        rows.append(row)
        lines.append(
            [
                f"{r}",
                f"{r * r}",
                f"{row['ours_s']:.2f}",
                f"{row['peft_s']:.1f}",
                f"{row['peft/ours']:.0f} x",
                f"{row['ours_peak_bytes'] / 1e6:.0f}",
                f"{row['peft_peak_bytes'] / 1e6:.0f}",
                f"{row['ours_error']:.4f}",
                f"{row['peft_error']:.4f}",
            ]
        )
    text = table(
        [
            f"r, {rows[0]['linears']} linears of {options.size}²",
            "exact rank",
            "s",
            "PEFT, s",
            "faster",
            "MB at once",
            "PEFT, MB",
            f"error at rank {options.rank}",
            "PEFT, error",
        ],
        lines,
    )
    if options.quick:
        print(text)
        return
    write("truncation", "A LoRA of a rank from FedPara's factors", text, rows)


if __name__ == "__main__":
    main()
