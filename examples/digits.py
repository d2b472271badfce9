"""The digits task that the demo, its reload check and the benchmark share.

Handwritten digits (8x8 pixels, ten classes) that scikit-learn carries, so nothing is downloaded.
"""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import FedParaConfig

METHODS = ("dense", "lowrank", "fedpara")


def load_data(test_fraction: float = 0.25) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set; the split is the same in every process."""
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = int(len(order) * (1 - test_fraction))
    train, test = order[:cut], order[cut:]
    return TensorDataset(inputs[train], labels[train]), TensorDataset(inputs[test], labels[test])


class DigitsNet(nn.Module):
    """A convolution and two dense layers, with a batch norm whose buffers must travel too."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 16, width)
        self.output = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images given as (batch, 64)."""
        x = torch.relu(self.norm(self.conv(x.view(-1, 1, 8, 8))))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.output(torch.relu(self.hidden(x)))


def build_model(method: str, gamma: float, seed: int) -> nn.Module | PeftModel:
    """The plain net, or its hidden layer factorized (the others are too small to save much)."""
    torch.manual_seed(seed)
    model = DigitsNet()
    if method == "dense":
        return model
    config = FedParaConfig(
        parameterization=method,
        gamma=gamma,
        base_weight="replaced",
        target_modules=["hidden"],
    )
    return get_peft_model(model, config)
