"""Cost of an adapter on a frozen linear layer, beside PEFT's LoRA and LoHa in the same run.

    python benchmarks/adapters.py [--quick] [--seconds 2] [--device cuda] [--compile]

One step is forward and backward with gradients for the input and the adapter. LoRA has the same
number of parameters (rank 2r). Times are medians of paired ratios.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from measure import bytes_kept, paired, peak_bytes, ratio
from peers import adapt
from report import ask_device, table, write
from torch import nn

CASES = [
    # outputs, inputs, tokens, r, dtype
    (768, 768, 64, 8, torch.float32),
    (768, 768, 512, 8, torch.float32),
    (768, 768, 512, 16, torch.float32),
    (768, 768, 512, 32, torch.float32),
    (768, 768, 2048, 8, torch.float32),
    (2048, 2048, 512, 16, torch.float32),
    (4096, 4096, 1, 8, torch.float32),
    (4096, 4096, 64, 8, torch.float32),
    (4096, 4096, 512, 4, torch.float32),
    (4096, 4096, 512, 8, torch.float32),
    (4096, 4096, 512, 32, torch.float32),
    (4096, 4096, 2048, 8, torch.float32),
    (11008, 4096, 64, 8, torch.float32),
    (11008, 4096, 512, 8, torch.float32),
    (4096, 11008, 64, 8, torch.float32),
    (4096, 4096, 64, 8, torch.bfloat16),
    (4096, 4096, 512, 8, torch.bfloat16),
]
QUICK = [(768, 768, 512, 8, torch.float32), (4096, 4096, 64, 8, torch.bfloat16)]


def build(kind: str, base: nn.Linear, r: int) -> nn.Module:
    """A frozen linear layer with an adapter."""
    return adapt(kind, nn.Sequential(base), r, ["0"], std=0.05)


def lycoris(base: nn.Linear, r: int) -> nn.Module:
    """LyCORIS's LoHa on a frozen layer."""
    from lycoris.modules.loha import LohaModule

    layer = copy.deepcopy(base).requires_grad_(False)
    module = LohaModule("layer", layer, 1.0, r, r)
    module.apply_to()
    return _Lycoris(layer, module)


class _Lycoris(nn.Module):
    def __init__(self, layer: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.layer, self.module = layer, module
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(0, 0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The patched layer."""
        return self.layer(x)


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """One forward and backward."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        model(x).backward(grad)

    return run


def measure(case: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """All methods on one case."""
    m, n, tokens, r, dtype = case
    seconds = options.seconds
    torch.manual_seed(0)
    with torch.device(options.device):
        base = nn.Linear(n, m).to(dtype)
        x = torch.randn(tokens, n, dtype=dtype, requires_grad=True)
        grad = torch.randn(tokens, m, dtype=dtype)
        models = {kind: build(kind, base, r) for kind in ("frozen", "fedpara", "lora", "loha")}
        if find_spec("lycoris"):
            models["lycoris"] = lycoris(base, r)
    if options.compile:
        torch._dynamo.reset()
        for model in models.values():
            model.compile()
    times = paired({k: step(model, x, grad) for k, model in models.items()}, seconds)
    row: dict[str, Any] = {"m": m, "n": n, "tokens": tokens, "r": r, "dtype": str(dtype)[6:]}
    for kind, model in models.items():
        known = [x, *model.parameters()]
        row[f"{kind}_ms"] = statistics.median(times[kind])
        row[f"{kind}_kept_bytes"] = bytes_kept(lambda model=model: model(x), known)  # type: ignore[misc]
        row[f"{kind}_peak_bytes"] = peak_bytes(step(model, x, grad), known)
        if kind != "fedpara":
            row[f"fedpara/{kind}"] = ratio(times, "fedpara", kind)
    if dtype == torch.bfloat16:
        for kind in ("fedpara", "lora", "loha"):
            row[f"{kind}_error"] = output_error(kind, base, r, x)
    if tokens == 1 and not options.compile:
        row |= inference(models, base, n, seconds)
    return row


def output_error(kind: str, base: nn.Linear, r: int, x: torch.Tensor) -> float:
    """Relative error of an adapter's output against float64, over a base weight of zero."""
    zero = copy.deepcopy(base)
    with torch.no_grad():
        zero.weight.zero_()
        zero.bias.zero_()
        model = build(kind, zero, r)
        exact = copy.deepcopy(model).double()(x.double())
        return float((model(x).double() - exact).norm() / exact.norm())


def inference(
    models: dict[str, nn.Module], base: nn.Linear, n: int, seconds: float
) -> dict[str, Any]:
    """One token without gradients, unmerged and merged."""
    x = torch.randn(1, n, dtype=base.weight.dtype, device=base.weight.device)
    runs = {"plain": nn.Sequential(base), **{k: v for k, v in models.items() if k != "frozen"}}
    runs["merged"] = copy.deepcopy(models["fedpara"]).merge_and_unload()  # type: ignore[operator]
    with torch.no_grad():
        times = paired(
            {k: functools.partial(model.eval(), x) for k, model in runs.items()}, seconds
        )
    return {f"inference_{k}/plain": ratio(times, k, "plain") for k in runs if k != "plain"} | {
        "inference_fedpara/lora": ratio(times, "fedpara", "lora")
    }


def has_bfloat16(device: str) -> bool:
    """Whether bfloat16 is computed rather than emulated, which takes a thousand times as long."""
    return device != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few cases, nothing written")
    parser.add_argument("--seconds", type=float, default=2.0, help="per method and case")
    ask_device(parser, compiles=True)
    options = parser.parse_args()
    rows = []
    for case in QUICK if options.quick else CASES:
        if case[-1] == torch.bfloat16 and not has_bfloat16(options.device):
            print(f"{case}: left out, this CPU has no bfloat16 instructions")
            continue
        rows.append(measure(case, options))
        print({k: v for k, v in rows[-1].items() if "bytes" not in k}, flush=True)
    header = [
        "M x N, tokens", "r", "dtype", "ms", "of frozen", "of LoRA", "of LoHa", "of LyCORIS",
        "kept, MB (LoHa)", "peak, MB (LoHa)",
    ]  # fmt: skip
    lines = [
        [
            f"{r['m']}x{r['n']}, {r['tokens']}", str(r["r"]), r["dtype"], f"{r['fedpara_ms']:.2f}",
            f"{r['fedpara/frozen']:.2f}", f"{r['fedpara/lora']:.2f}", f"{r['fedpara/loha']:.3f}",
            f"{r['fedpara/lycoris']:.3f}" if "fedpara/lycoris" in r else "-",
            f"{r['fedpara_kept_bytes'] / 1e6:.2f} ({r['loha_kept_bytes'] / 1e6:.2f})",
            f"{r['fedpara_peak_bytes'] / 1e6:.1f} ({r['loha_peak_bytes'] / 1e6:.1f})",
        ]
        for r in rows
    ]  # fmt: skip
    text = table(header, lines)
    half = [r for r in rows if "fedpara_error" in r]
    if half:
        text += (
            "\n\nbfloat16 base, float32 adapters, 512 tokens: relative error of the adapter's "
            "output (in bfloat16, base weight zero) against float64: "
        ) + ", ".join(f"{k} {half[-1][f'{k}_error']:.4f}" for k in ("fedpara", "lora", "loha"))
        text += ". PEFT runs LoRA and LoHa in float32 there and rounds the result."
    single = [r for r in rows if "inference_fedpara/lora" in r]
    if single:
        text += (
            "\n\nOne token without gradients, unmerged, of the plain layer: "
            + ", ".join(
                f"{k.removeprefix('inference_').removesuffix('/plain')} {v:.2f}"
                for k, v in single[0].items()
                if k.startswith("inference_") and k.endswith("/plain")
            )
            + f"; FedPara of LoRA {single[0]['inference_fedpara/lora']:.2f}."
        )
    if options.quick:
        print(text)
    else:
        title = "An adapter on a frozen linear layer: one training step"
        write("adapters", title, text, rows, options.device, options.compile)


if __name__ == "__main__":
    main()
