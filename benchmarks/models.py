"""The paper's models, which are the examples'."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from lstm_shakespeare import CharLSTM
from resnet18_cifar import resnet18
from vgg16_cifar import vgg, vgg16

__all__ = ["char_lstm", "mlp", "resnet18", "vgg", "vgg16"]


def mlp(classes: int = 10) -> nn.Sequential:
    """The personalization experiments' net: two dense layers."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, classes))


def char_lstm(characters: int = 80) -> nn.Module:
    """The example's model of Shakespeare's characters."""
    return CharLSTM(characters)
