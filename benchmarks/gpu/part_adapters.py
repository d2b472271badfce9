"""Adapters on a frozen linear layer and on a whole Llama, beside PEFT's and LyCORIS's."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from adapters import build, lycoris, step
from measure import bytes_kept, peak_bytes
from peers import adapt
from session import PRECISIONS, Measurement, Session, peers_module, products_in
from timing import compared, paired
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

KINDS = ("fedpara", "frozen", "lora", "loha")
SHAPES = ((4096, 4096), (2048, 2048), (11008, 4096))
TOKENS = (2048, 64, 1)
RANKS = (8, 32, 16)


def measure(session: Session, options: argparse.Namespace) -> None:
    """Layers in bfloat16, the Llama, then layers in the other precisions."""
    session.each(cases(session.smoke))


def cases(smoke: bool) -> list[Measurement]:
    """What is measured, the most telling first."""
    if smoke:
        return [
            ("layer", layer, {"m": 48, "n": 32, "tokens": 8, "r": 2, "precision": "float32"}),
            ("layer", layer, {"m": 48, "n": 32, "tokens": 8, "r": 2, "precision": "bf16 all"}),
            ("inference", inference, {"m": 48, "n": 32, "tokens": 1, "r": 2, "precision": "bf16"}),
            ("llama", llama, {"r": 2, "precision": "bf16"}),
        ]
    found: list[Measurement] = []
    for name in ("bf16", "tf32", "bf16 all", "float32"):
        for r in RANKS:
            for (m, n), tokens in itertools.product(SHAPES, TOKENS):
                case = {"m": m, "n": n, "tokens": tokens, "r": r, "precision": name}
                # A batch of one row trains nobody's model, but it is what decoding applies.
                if tokens > 1:
                    found.append(("layer", layer, case))
                if r != 16:
                    found.append(("inference", inference, case))
            if (name, r) in (("bf16", 8), ("bf16", 32), ("tf32", 8)):
                found.append(("llama", llama, {"r": r, "precision": name}))
    return found


def made(
    session: Session, m: int, n: int, r: int, name: str
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Adapted layers by kind, and why a peer's is missing."""
    torch.manual_seed(0)
    base_dtype, adapter_dtype = PRECISIONS[name]
    base = nn.Linear(n, m, device=session.device, dtype=base_dtype)
    models = {kind: build(kind, base, r) for kind in KINDS}
    if peers_module() is not None:
        models["lycoris"] = lycoris(base, r)
    failed = {}
    for kind, model in [*models.items()]:
        model.to(device=session.device)
        if adapter_dtype == base_dtype:
            model.to(adapter_dtype)
        if kind not in KINDS:
            try:  # what another package cannot do is no failure of ours
                x = torch.randn(2, n, device=session.device, dtype=base_dtype, requires_grad=True)
                model(x).sum().backward()
            except Exception as error:
                failed[kind] = f"{type(error).__name__}: {error}"[:200]
                del models[kind]
    return models, {"failed": failed} if failed else {}


def layer(session: Session, m: int, n: int, tokens: int, r: int, precision: str) -> dict[str, Any]:
    """One training step of a layer: forward and backward, to the input and the adapter."""
    with products_in(precision):
        models, failed = made(session, m, n, r, precision)
        dtype = PRECISIONS[precision][0]
        x = torch.randn(tokens, n, device=session.device, dtype=dtype, requires_grad=True)
        grad = torch.randn(tokens, m, device=session.device, dtype=dtype)
        runs = {kind: step(model, x, grad) for kind, model in models.items()}
        row = compared(paired(runs, session.device, 0.005 if session.smoke else 0.05), "fedpara")
        memory = {
            kind: {
                "kept": bytes_kept(functools.partial(model, x), [x, *model.parameters()]),
                "peak": peak_bytes(runs[kind], [x, *model.parameters()]),
            }
            for kind, model in models.items()
        }
    return {**row, "bytes": memory, **failed}


def inference(
    session: Session, m: int, n: int, tokens: int, r: int, precision: str
) -> dict[str, Any]:
    """A forward pass without gradients, and with FedPara merged."""
    with products_in(precision), torch.no_grad():
        with torch.enable_grad():
            models, failed = made(session, m, n, r, precision)
        models["merged"] = copy.deepcopy(models["fedpara"]).merge_and_unload()  # type: ignore[operator]
        x = torch.randn(tokens, n, device=session.device, dtype=PRECISIONS[precision][0])
        runs = {kind: functools.partial(model.eval(), x) for kind, model in models.items()}
        row = compared(paired(runs, session.device, 0.005 if session.smoke else 0.03), "fedpara")
    return {**row, **failed}


def llama_config(smoke: bool, layers: int = 16) -> LlamaConfig:
    """A Llama of about a billion weights."""
    if smoke:
        return LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=64,
        )  # fmt: skip
    return LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16,
        vocab_size=32000,
    )  # fmt: skip


def llamas(
    session: Session, r: int, name: str, layers: int = 16, kinds: tuple[str, ...] = KINDS
) -> dict[str, nn.Module]:
    """The model adapted in every way, all of its linear layers but the head."""
    torch.manual_seed(0)
    base_dtype, adapter_dtype = PRECISIONS[name]
    with torch.device(session.device):
        base = LlamaForCausalLM(llama_config(session.smoke, layers)).to(base_dtype)
        models = {kind: adapt(kind, base, r, "all-linear", std=0.02) for kind in kinds}
    for model in models.values():
        model.to(device=session.device)
        if adapter_dtype == base_dtype:
            model.to(adapter_dtype)
    return models


def llama_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward and backward; the input has a gradient, so that the frozen model has a way back."""

    def run() -> None:
        model.zero_grad()
        x.grad = None
        model(inputs_embeds=x, labels=labels, use_cache=False).loss.backward()

    return run


def llama(session: Session, r: int, precision: str) -> dict[str, Any]:
    """Training steps of 4 x 512 and of 64 tokens, and forward passes of 64 and of one."""
    shapes = [(1, 4)] if session.smoke else [(4, 512), (1, 64), (1, 1)]
    seconds = 0.01 if session.smoke else 0.4
    found: dict[str, Any] = {}
    with products_in(precision):
        models = llamas(session, r, precision)
        config = llama_config(session.smoke)
        for batch, length in shapes:
            size = (batch, length, config.hidden_size)
            x = torch.randn(size, device=session.device, dtype=PRECISIONS[precision][0])
            ids = torch.randint(0, config.vocab_size, (batch, length), device=session.device)
            if length > 1:
                x.requires_grad_()
                runs = {kind: llama_step(model, x, ids) for kind, model in models.items()}
                row = compared(paired(runs, session.device, seconds), "fedpara")
                row["bytes"] = {
                    kind: {"peak": peak_bytes(run, [x, *models[kind].parameters()])}
                    for kind, run in runs.items()
                }
                found[f"step, {batch} x {length} tokens"] = row
                for model in models.values():
                    model.zero_grad()
            if batch == 1:
                with torch.no_grad():
                    runs = {
                        kind: functools.partial(model.eval(), inputs_embeds=x, use_cache=False)
                        for kind, model in models.items()
                    }
                    row = compared(paired(runs, session.device, seconds), "fedpara")
                found[f"inference, {batch} x {length} tokens"] = row
                for model in models.values():
                    model.train()
    return {"runs": found, "parameters": _trained(models)}


def _trained(models: dict[str, nn.Module]) -> dict[str, int]:
    return {
        kind: sum(p.numel() for p in model.parameters() if p.requires_grad)
        for kind, model in models.items()
    }
