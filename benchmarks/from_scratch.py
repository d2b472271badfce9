"""A whole training step with replaced weights, beside the dense model, in the same run.

    python benchmarks/from_scratch.py [--quick] [--seconds 10] [--device cuda] [--compile]

Peers compose the same factors their way inside the same layers: `einsum` as the paper's published
notebook does, `recompute` with a Function that keeps the factors only and composes again in the
backward pass, as LyCORIS does. γ = 0.1 (LSTM and MLP: 0). Kept are the bytes that the forward pass
leaves for the backward one, beside parameters and inputs; the peak is that of what a step makes,
gradients included.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import bytes_kept, paired, peak_bytes, ratio
from models import char_lstm, mlp, resnet18, vgg16
from peft import get_peft_model
from report import ask_device, table, write
from torch import nn

import fedpara_peft.tuner.layer.base as layer_module
from fedpara_peft import FedParaConfig
from fedpara_peft.maths.compose import Half, compose
from fedpara_peft.maths.halves import khatri_rao


def einsum_compose(halves: Sequence[Half], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Each half by one einsum."""
    parts = []
    for x, y, t in halves:
        if t is None:
            parts.append(torch.einsum("or,ir->oi", x, y))
        else:
            parts.append(torch.einsum("abkl,oa,ib->oikl", t, x, y))
    return parts[0] * parts[1]


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*factors)
        return einsum_compose(_halves(factors))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        factors = [f.detach().requires_grad_() for f in ctx.saved_tensors]
        with torch.enable_grad():
            weight = einsum_compose(_halves(factors))
        return torch.autograd.grad(weight, factors, grad)


def _halves(factors: Sequence[torch.Tensor]) -> list[Half]:
    size = len(factors) // 2
    return [Half(*factors[:size]), Half(*factors[size:])]


def recompute_compose(halves: Sequence[Half], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Keep only the factors for backward."""
    return _Recompute.apply(*(f for half in halves for f in half.tensors()))


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "fedpara": compose,
    "einsum": einsum_compose,
    "recompute": recompute_compose,
}
MEMORY = ("dense", "fedpara", "einsum")


def cases() -> dict[str, tuple[Callable[[], nn.Module], list[str] | str, float, Any, Any]]:
    """Name to model, targets, γ, inputs, labels."""

    def images(n: int) -> torch.Tensor:
        return torch.randn(n, 3, 32, 32)

    def classes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 10, shape)

    convolutions = r".*\d+|.*conv\d|.*short\.0"
    return {
        "VGG16-GN, batch 64": (vgg16, convolutions, 0.1, images(64), classes(64)),
        "VGG16-GN, batch 10": (vgg16, convolutions, 0.1, images(10), classes(10)),
        "ResNet18, batch 64": (resnet18, convolutions, 0.1, images(64), classes(64)),
        "LSTM 2x256, T 80, batch 64": (char_lstm, ["lstm"], 0.0, classes(64, 80), classes(64, 80)),
        "MLP, batch 10": (mlp, ["0"], 0.0, torch.randn(10, 784), classes(10)),
        "MLP, batch 64": (mlp, ["0"], 0.0, torch.randn(64, 784), classes(64)),
    }


def targets_of(model: nn.Module, wanted: list[str] | str) -> list[str]:
    """Convolutions, or the named modules."""
    if isinstance(wanted, list):
        return wanted
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def steps(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, way: str
) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """A forward pass, and one SGD step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def forward() -> torch.Tensor:
        layer_module.compose = WAYS.get(way, compose)  # type: ignore[attr-defined]
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        layer_module.compose = compose  # type: ignore[attr-defined]
        return loss

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    return forward, step


def arithmetic(device: str, seconds: float) -> tuple[str, list[dict[str, Any]]]:
    """The least that a factorized MLP's step costs: its first layer's operations, bare.

    No autograd, nothing checked, results thrown away. W₁ ⊙ W₂ has products beyond the dense
    layer's two whichever way it is applied, so the dense step without those two, and without the
    update of W, plus the cheaper way's operations is a bound from below.
    """
    rows, lines = [], []
    for name in ("MLP, batch 10", "MLP, batch 64"):
        build, _, _, x, y = cases()[name]
        model = build().to(device)
        x, y = x.to(device), y.to(device)
        weight = model[0].weight.detach().clone()
        (m, n), grad = weight.shape, torch.randn(len(x), len(weight), device=device)
        config = FedParaConfig(gamma=0.0, base_weight="replaced", target_modules=["0"])
        factorized: Any = get_peft_model(build().to(device), config)
        x1, y1, x2, y2 = (
            factor.detach()
            for half in factorized.base_model.model[0].halves("default")
            for factor in half.tensors()
        )
        r = x1.shape[1]
        runs = {
            "dense step": steps(model, x, y, "dense")[1],
            "dense layer": functools.partial(_dense_layer, weight, x, grad),
            "composed": functools.partial(_composed_layer, x1, y1, x2, y2, x, grad),
            "low-rank form": functools.partial(_form_layer, x1, y1, x2, y2, x, grad),
        }
        times = paired(runs, seconds)
        cheaper = min("composed", "low-rank form", key=lambda way: statistics.median(times[way]))
        least = statistics.median(
            (step - layer + way) / step
            for step, layer, way in zip(
                times["dense step"], times["dense layer"], times[cheaper], strict=True
            )
        )
        shares = {way: ratio(times, way, "dense step") for way in runs if way != "dense step"}
        rows.append({"arithmetic": name, "m": m, "n": n, "r": r, **shares, "least": least})
        lines.append([name, *(f"{share:.2f}" for share in shares.values()), f"{least:.2f}"])
        print(lines[-1], flush=True)
    header = ["of the dense step", "dense layer and update", "composed", "low-rank form", "least"]
    return table(header, lines), rows


def _dense_layer(weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> None:
    x @ weight.T
    weight.add_(grad.T @ x, alpha=-1e-9)


def _composed_layer(
    x1: torch.Tensor, y1: torch.Tensor, x2: torch.Tensor, y2: torch.Tensor,
    x: torch.Tensor, grad: torch.Tensor,
) -> None:  # fmt: skip
    w1, w2 = x1 @ y1.T, x2 @ y2.T
    x @ (w1 * w2).T
    of_w = grad.T @ x
    for of_half, left, right in ((of_w * w2, x1, y1), (of_w * w1, x2, y2)):
        of_half @ right
        of_half.T @ left


def _form_layer(
    x1: torch.Tensor, y1: torch.Tensor, x2: torch.Tensor, y2: torch.Tensor,
    x: torch.Tensor, grad: torch.Tensor,
) -> None:  # fmt: skip
    a, b = khatri_rao(x1, x2), khatri_rao(y1, y2)
    h, of_h = x @ b, grad @ a
    h @ a.T
    for of_form, one, other in ((grad.T @ h, x1, x2), (x.T @ of_h, y1, y2)):
        apart = of_form.view(len(one), one.shape[1], -1)
        torch.bmm(apart, other.unsqueeze(2))
        (apart * one.unsqueeze(2)).sum(1)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the MLP, nothing written")
    parser.add_argument("--seconds", type=float, default=10.0, help="per way and model")
    ask_device(parser, compiles=True)
    options = parser.parse_args()
    rows, lines = [], []
    for name, (build, wanted, gamma, x, y) in cases().items():
        if options.quick and build is not mlp:
            continue
        x, y = x.to(options.device), y.to(options.device)
        torch._dynamo.reset()
        models, forwards, runs = {}, {}, {}
        for way in ("dense", *WAYS):
            torch.manual_seed(0)
            model: Any = build()
            if way != "dense":
                config = FedParaConfig(
                    gamma=gamma,
                    base_weight="replaced",
                    target_modules=targets_of(model, wanted),
                    # The peers compose always; ours takes the way it takes.
                    compute_path="auto" if way == "fedpara" else "compose",
                )
                model = get_peft_model(model, config)
            models[way] = model.to(options.device)
            if options.compile:
                model.compile()
            forwards[way], runs[way] = steps(model, x, y, way)
        times = paired(runs, options.seconds)
        row = {"model": name, "dense_ms": statistics.median(times["dense"])}
        row |= {f"{way}/dense": ratio(times, way, "dense") for way in WAYS}
        for way, model in models.items():
            known = [x, y, *model.parameters()]
            row[f"{way}_kept_bytes"] = bytes_kept(forwards[way], known)
            row[f"{way}_peak_bytes"] = peak_bytes(runs[way], model.parameters())
        rows.append(row)
        memory = (
            " / ".join(f"{row[f'{way}_{what}_bytes'] / 1e6:.1f}" for way in MEMORY)
            for what in ("kept", "peak")
        )
        ratios = (f"{row[f'{way}/dense']:.2f}" for way in WAYS)
        lines.append([name, f"{row['dense_ms']:.1f}", *ratios, *memory])
        print(lines[-1], flush=True)
    header = ["model", "dense, ms", "FedPara", "einsum", "recompute"]
    header += [f"{what}, MB: dense / FedPara / einsum" for what in ("kept", "peak")]
    text = table(header, lines)
    bare, shares = arithmetic(options.device, options.seconds / 4)
    text += (
        "\n\n## What an MLP's step costs at least\n\nIts first layer's operations, bare, as shares "
        "of the dense step. Least: the dense step without its first layer and that one's update, "
        f"and with the cheaper way.\n\n{bare}"
    )
    rows += shares
    if options.quick:
        print(text)
    else:
        title = "Training from scratch: a step's time relative to the dense model's"
        write("from_scratch", title, text, rows, options.device, options.compile)


if __name__ == "__main__":
    main()
