"""By torch.compile, and by a CUDA graph: what of the times is launching kernels."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from adapters import step
from part_adapters import llama_config, llama_step, llamas, made
from part_from_scratch import built, nets, training_step
from session import PRECISIONS, Measurement, Session, products_in
from timing import captured, compared, paired
from torch import nn


def measure(session: Session, options: argparse.Namespace) -> None:
    """Graphs of layers, which are quick to make, then what is compiled."""
    if session.smoke:
        layer = {"m": 48, "n": 32, "tokens": 8, "r": 2, "precision": "float32"}
        session.each([
            ("compiled layer", compiled_layer, layer),
            ("compiled model", compiled_model,
             {"net": "small", "batch": 2, "setting": "float32"}),
            ("compiled llama", compiled_llama, {"r": 2, "precision": "bf16"}),
        ])  # fmt: skip
        return
    todo: list[Measurement] = []
    for name in ("bf16", "tf32") if session.device == "cuda" else ():
        for r in (8, 32):
            for size in (4096, 2048):
                for tokens in (2048, 64):
                    case = {"m": size, "n": size, "tokens": tokens, "r": r, "precision": name}
                    todo.append(("captured layer", captured_layer, case))
    compiled = [
        ("compiled layer", compiled_layer,
         {"m": 4096, "n": 4096, "tokens": 2048, "r": r, "precision": name})
        for name, r in (("bf16", 8), ("bf16", 32), ("tf32", 8))
    ]  # fmt: skip
    compiled[1:1] = [
        ("compiled llama", compiled_llama, {"r": 8, "precision": "bf16"}),
        ("compiled model", compiled_model,
         {"net": "VGG16", "batch": 64, "setting": "bf16 autocast"}),
    ]  # fmt: skip
    compiled.append(("compiled model", compiled_model,
                     {"net": "ResNet18", "batch": 64, "setting": "tf32"}))  # fmt: skip
    session.each([*todo, *compiled])


def captured_layer(
    session: Session, m: int, n: int, tokens: int, r: int, precision: str
) -> dict[str, Any]:
    """A layer's training step, replayed as a graph: the kernels' time alone."""
    with products_in(precision):
        models, failed = made(session, m, n, r, precision)
        dtype = PRECISIONS[precision][0]
        x = torch.randn(tokens, n, device=session.device, dtype=dtype, requires_grad=True)
        grad = torch.randn(tokens, m, device=session.device, dtype=dtype)
        runs = {}
        for kind, model in models.items():
            try:
                runs[kind] = captured(step(model, x, grad))
            except Exception as error:
                if kind in ("fedpara", "frozen"):
                    raise
                failed.setdefault("failed", {})[kind] = str(error)[:200]  # type: ignore[index]
        return {**compared(paired(runs, session.device, 0.05), "fedpara"), **failed}


def compile_(session: Session, model: nn.Module) -> nn.Module:
    """Compile in place; a smoke run traces, and generates no code."""
    model.compile(backend="aot_eager" if session.smoke else "inductor", dynamic=False)
    return model


def require_same_gradients(
    runs: dict[str, Callable[[], None]], model: nn.Module, plain: nn.Module
) -> None:
    """Two equal models' steps give equal gradients, up to half precision; before any is timed."""
    runs["fedpara"]()
    runs["not compiled"]()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            apart = float((p.grad - q.grad).norm() / q.grad.norm())
            if not apart < 0.05:
                raise AssertionError(f"compiled, {name}'s gradient is {apart:.0%} off")


def compiled_layer(
    session: Session, m: int, n: int, tokens: int, r: int, precision: str
) -> dict[str, Any]:
    """A layer's training step, compiled."""
    torch._dynamo.reset()
    with products_in(precision):
        models, _ = made(session, m, n, r, precision)
        models.pop("lycoris", None)  # it has kernels of its own, which are measured as they are
        plain = made(session, m, n, r, precision)[0]["fedpara"]
        dtype = PRECISIONS[precision][0]
        x = torch.randn(tokens, n, device=session.device, dtype=dtype, requires_grad=True)
        grad = torch.randn(tokens, m, device=session.device, dtype=dtype)
        runs = {kind: step(compile_(session, model), x, grad) for kind, model in models.items()}
        runs["not compiled"] = step(plain, x, grad)
        require_same_gradients(runs, models["fedpara"], plain)
        return compared(paired(runs, session.device, 0.01 if session.smoke else 0.1), "fedpara")


def compiled_model(session: Session, net: str, batch: int, setting: str) -> dict[str, Any]:
    """A model's training step with replaced weights, compiled."""
    torch._dynamo.reset()
    build, gamma, inputs = nets()[net]
    x, y = inputs(batch, device=session.device)
    make = functools.partial(built, build, gamma=gamma, device=session.device)
    modules = {"auto": compile_(session, make("auto")), "dense": compile_(session, make("dense")),
               "not compiled": make("auto")}  # fmt: skip
    with products_in(setting):
        runs = {
            way: training_step(module, x, y, setting, session.device)
            for way, module in modules.items()
        }
        return compared(paired(runs, session.device, 0.01 if session.smoke else 0.25), "auto")


def compiled_llama(session: Session, r: int, precision: str) -> dict[str, Any]:
    """Two of the Llama's layers, whose step compiles in a time that this has."""
    torch._dynamo.reset()
    with products_in(precision):
        models = llamas(session, r, precision, layers=2, kinds=("fedpara", "frozen", "lora"))
        plain = llamas(session, r, precision, layers=2, kinds=("fedpara",))["fedpara"]
        config = llama_config(session.smoke)
        length = 4 if session.smoke else 512
        dtype = PRECISIONS[precision][0]
        x = torch.randn(4, length, config.hidden_size, device=session.device, dtype=dtype)
        x.requires_grad_()
        ids = torch.randint(0, config.vocab_size, (4, length), device=session.device)
        runs = {kind: llama_step(compile_(session, m), x, ids) for kind, m in models.items()}
        runs["not compiled"] = llama_step(plain, x, ids)
        return compared(paired(runs, session.device, 0.01 if session.smoke else 0.3), "fedpara")
