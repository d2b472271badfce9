"""Both ways of applying a weight: whether the cost rule takes the faster one on this device."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from adapters import step
from peft import get_peft_model
from session import PRECISIONS, Measurement, Session, products_in
from timing import compared, paired
from torch import Tensor, nn

from fedpara_peft import FedParaConfig, FedParaLayer

SHAPES = ((768, 768), (2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 16, 64, 512, 2048, 8192)
RANKS = (4, 8, 16, 32)
CONVOLUTIONS = ((64, 32, 3), (128, 16, 3), (256, 8, 3), (512, 4, 3), (320, 16, 3), (256, 16, 1))
BATCHES = (8, 64, 256)


def measure(session: Session, options: argparse.Namespace) -> None:
    """Cases in random order, so that those for which there was time are a fair sample."""
    todo = cases(session.smoke)
    random.Random(0).shuffle(todo)
    session.each(todo, collect=25)


def cases(smoke: bool) -> list[Measurement]:
    """The grid."""
    if smoke:
        return [
            ("linear", linear, {"m": 24, "n": 32, "tokens": 4, "r": 2, "precision": "float32",
                                "base": base, "training": training})
            for base, training in itertools.product(("frozen", "replaced"), (True, False))
        ] + [
            ("conv", conv, {"channels": 16, "pixels": 4, "kernel": 3, "batch": 2, "r": 2,
                            "precision": "float32", "base": "replaced", "training": True})
        ]  # fmt: skip
    found: list[Measurement] = []
    for (m, n), tokens, r, name, base, training in itertools.product(
        SHAPES, TOKENS, RANKS, ("bf16", "tf32", "float32"), ("frozen", "replaced"), (True, False)
    ):
        # Decoding trains nothing, replaced weights of an LLM are rare, float32 is slow.
        if (tokens == 1 and training) or (base == "replaced" and max(m, n) > 4096):
            continue
        if name == "float32" and (tokens in (16, 8192) or r == 4):
            continue
        case = {"m": m, "n": n, "tokens": tokens, "r": r, "precision": name, "base": base,
                "training": training}  # fmt: skip
        found.append(("linear", linear, case))
    for (channels, pixels, kernel), batch, r, name, base in itertools.product(
        CONVOLUTIONS, BATCHES, (8, 16, 32), ("bf16", "tf32"), ("frozen", "replaced")
    ):
        if r == 32 and batch == 256:  # seconds a call, and nobody's choice
            continue
        case = {"channels": channels, "pixels": pixels, "kernel": kernel, "batch": batch, "r": r,
                "precision": name, "base": base, "training": True}  # fmt: skip
        found.append(("conv", conv, case))
    return found


def linear(
    session: Session, m: int, n: int, tokens: int, r: int, precision: str, base: str, training: bool
) -> dict[str, Any]:
    """A linear layer by both ways."""
    dtype = PRECISIONS[precision][0]
    layer = nn.Linear(n, m, device=session.device, dtype=dtype)
    x = torch.randn(tokens, n, device=session.device, dtype=dtype, requires_grad=training)
    grad = torch.randn(tokens, m, device=session.device, dtype=dtype) if training else None
    return _both(session, layer, x, grad, r, precision, base)


def conv(
    session: Session, channels: int, pixels: int, kernel: int, batch: int, r: int, precision: str,
    base: str, training: bool,
) -> dict[str, Any]:  # fmt: skip
    """A convolution by both ways."""
    dtype = PRECISIONS[precision][0]
    layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, device=session.device,
                      dtype=dtype)  # fmt: skip
    size = (batch, channels, pixels, pixels)
    x = torch.randn(size, device=session.device, dtype=dtype, requires_grad=training)
    grad = torch.randn(size, device=session.device, dtype=dtype) if training else None
    return _both(session, layer, x, grad, r, precision, base)


def _both(
    session: Session, plain: nn.Module, x: Tensor, grad: Tensor | None, r: int, precision: str,
    base: str,
) -> dict[str, Any]:  # fmt: skip
    """Times of both ways, and what the rule knows."""
    config = FedParaConfig(r=r, base_weight=base, target_modules=["0"])
    model = get_peft_model(nn.Sequential(plain), config).to(session.device)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.05)
    layer = next(m for m in model.modules() if isinstance(m, FedParaLayer))
    ours = layer.specs["default"]
    plan = ours.plans.get("weight")
    if plan is None:  # a replaced weight that factors would not make smaller stays dense
        return {"skipped": "it stays dense"}
    run = step(model, x, grad) if grad is not None else _without_gradients(model, x)

    def going(path: str) -> Callable[[], None]:
        spec = dataclasses.replace(ours, compute_path=path)

        def once() -> None:
            layer.specs["default"] = spec
            run()

        return once

    runs = {path: going(path) for path in ("compose", "khatri_rao")}
    with products_in(precision):
        times = paired(runs, session.device, 0.003 if session.smoke else 0.02, most=15)
        layer.specs["default"] = ours
        with torch.set_grad_enabled(grad is not None):
            joined = base == "frozen" and layer._can_join(x, "default")
    return {
        **compared(times, "khatri_rao"),
        "joined": joined,
        "positions": layer._positions(x),
        "dense": plan.shape.numel,
        "form": plan.form_parameters,
        "rank": plan.r,
    }


def _without_gradients(model: nn.Module, x: Tensor) -> Callable[[], None]:
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(x)

    return run
