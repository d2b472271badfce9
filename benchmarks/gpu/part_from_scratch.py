"""Replaced weights: a whole training step beside the dense model's, in every way of computing."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from example_models import char_lstm, resnet18, vgg16
from from_scratch import WAYS as COMPOSED
from measure import peak_bytes
from peft import get_peft_model
from session import Measurement, Session, products_in
from timing import compared, paired
from torch import Tensor, nn

import fedpara_peft.tuner.layer.base as layer_module
from fedpara_peft import FedParaConfig, FedParaLayer
from fedpara_peft.maths.compose import compose

#: Ways of applying a replaced weight; ``einsum`` composes as the paper's published notebook does.
WAYS = ("dense", "auto", "compose", "khatri_rao", "einsum")
SETTINGS = ("bf16 autocast", "tf32", "float32")
#: VGG16's and ResNet18's convolutions on images of 32 x 32: channels and pixels of a side.
CONVOLUTIONS = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2))


def measure(session: Session, options: argparse.Namespace) -> None:
    """Whole models first, then their layers one by one."""
    if session.smoke:
        session.each([
            ("model", model, {"net": "small", "batch": 2, "setting": "float32"}),
            ("model", model, {"net": "small LSTM", "batch": 2, "setting": "bf16 autocast"}),
            ("convolution", convolution,
             {"channels": 32, "pixels": 4, "batch": 2, "setting": "float32", "last": True}),
        ])  # fmt: skip
        return
    todo: list[Measurement] = []
    for setting in SETTINGS:
        for net, batch in (("VGG16", 64), ("LSTM 2x256, T 80", 64), ("ResNet18", 64),
                           ("VGG16", 256), ("ResNet18", 256), ("VGG16", 10)):  # fmt: skip
            todo.append(("model", model, {"net": net, "batch": batch, "setting": setting}))
    for setting in SETTINGS:
        for batch in (64, 256):
            for channels, pixels in CONVOLUTIONS:
                case = {"channels": channels, "pixels": pixels, "batch": batch, "setting": setting}
                todo += [("convolution", convolution, {**case, "last": last})
                         for last in (False, True)]  # fmt: skip
    session.each(todo)


def nets() -> dict[str, tuple[Callable[[], nn.Module], float, Any]]:
    """Builder, γ and inputs of a batch; outputs are scored against classes."""

    def images(n: int, device: str) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 3, 32, 32, device=device), torch.randint(10, (n,), device=device)

    def text(n: int, length: int, device: str) -> tuple[Tensor, Tensor]:
        return tuple(torch.randint(80, (n, length), device=device) for _ in range(2))  # type: ignore[return-value]

    def small() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    return {
        "VGG16": (vgg16, 0.1, images),
        "ResNet18": (resnet18, 0.1, images),
        "LSTM 2x256, T 80": (char_lstm, 0.0, functools.partial(text, length=80)),
        "small": (small, 0.1, images),
        "small LSTM": (char_lstm, 0.0, functools.partial(text, length=4)),
    }


def built(net: Callable[[], nn.Module], way: str, gamma: float, device: str) -> nn.Module:
    """The model on the device, its convolutions or recurrent layers factorized."""
    torch.manual_seed(0)
    with torch.device(device):
        module = net()
        if way == "dense":
            return module
        kinds = (nn.Conv2d, nn.LSTM)
        targets = [name for name, layer in module.named_modules() if isinstance(layer, kinds)]
        config = FedParaConfig(gamma=gamma, base_weight="replaced", target_modules=targets)
        module = get_peft_model(module, config).to(device)
    if way in ("compose", "khatri_rao"):
        for layer in module.modules():
            if isinstance(layer, FedParaLayer):
                layer.specs = {
                    name: dataclasses.replace(spec, compute_path=way)
                    for name, spec in layer.specs.items()
                }
    return module


def training_step(
    module: nn.Module, x: Tensor, y: Tensor, setting: str, device: str, way: str = "auto"
) -> Callable[[], None]:
    """Forward, loss, backward and SGD."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, foreach=True)
    half = setting == "bf16 autocast"

    def run() -> None:
        optimizer.zero_grad()
        if way == "einsum":
            layer_module.compose = COMPOSED["einsum"]  # type: ignore[attr-defined]
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(module(x).flatten(0, -2), y.flatten())
        layer_module.compose = compose  # type: ignore[attr-defined]
        loss.backward()
        optimizer.step()

    return run


def ways_of(net: str) -> tuple[str, ...]:
    """Recurrent layers compose their weights, in whatever way the others go."""
    return ("dense", "auto", "einsum") if "LSTM" in net else WAYS


def model(session: Session, net: str, batch: int, setting: str) -> dict[str, Any]:
    """A whole step in every way."""
    build, gamma, inputs = nets()[net]
    x, y = inputs(batch, device=session.device)
    modules = {way: built(build, way, gamma, session.device) for way in ways_of(net)}
    with products_in(setting):
        runs = {
            way: training_step(module, x, y, setting, session.device, way)
            for way, module in modules.items()
        }
        row = compared(paired(runs, session.device, 0.01 if session.smoke else 0.25), "auto")
        row["bytes"] = {
            way: {"peak": peak_bytes(run, modules[way].parameters())} for way, run in runs.items()
        }
    return row


def convolution(
    session: Session, channels: int, pixels: int, batch: int, setting: str, last: bool
) -> dict[str, Any]:
    """One convolution's forward and backward; ``last``: channels last in memory."""

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))

    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, channels, pixels, pixels, device=session.device)
    x = x.to(memory_format=layout).requires_grad_()
    grad = torch.randn_like(x)
    half = setting == "bf16 autocast"
    modules = {way: built(net, way, 0.1, session.device) for way in WAYS}
    modules["dense"] = modules["dense"].to(memory_format=layout)

    def step(way: str) -> None:
        module = modules[way]
        module.zero_grad()
        x.grad = None
        if way == "einsum":
            layer_module.compose = COMPOSED["einsum"]  # type: ignore[attr-defined]
        with torch.autocast(session.device, torch.bfloat16, enabled=half):
            out = module(x)
        layer_module.compose = compose  # type: ignore[attr-defined]
        out.backward(grad.to(out.dtype))

    with products_in(setting):
        runs = {way: functools.partial(step, way) for way in modules}
        return compared(paired(runs, session.device, 0.005 if session.smoke else 0.05), "auto")
