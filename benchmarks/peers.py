"""The adapters that the benchmarks put side by side, of equal size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from fedpara_peft import FedParaConfig


def adapt(
    kind: str, base: nn.Module, r: int, targets: Any, *, std: float, kernel: bool = False
) -> nn.Module:
    """Freeze a copy of a model and adapt it; factors are random, away from the zero start.

    LoRA has rank 2r, FedPara's and LoHa's number of parameters; ``kernel`` makes LoHa factorize
    convolutions by Prop. 3, as FedPara does.
    """
    base = copy.deepcopy(base).requires_grad_(False)
    if kind == "frozen":
        return base
    effective = {"use_effective_conv2d": True} if kernel else {}
    config: Any = {
        "fedpara": lambda: FedParaConfig(r=r, target_modules=targets),
        "lora": lambda: LoraConfig(r=2 * r, lora_alpha=2 * r, target_modules=targets),
        "loha": lambda: LoHaConfig(r=r, alpha=r, target_modules=targets, **effective),
    }[kind]()
    model = get_peft_model(base, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, std)
    return model
