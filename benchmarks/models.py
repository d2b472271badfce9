"""The paper's models in plain torch."""

from __future__ import annotations

import torch
from torch import nn

VGG16_CHANNELS = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool",
                  512, 512, 512, "pool", 512, 512, 512, "pool"]  # fmt: skip


def vgg16(classes: int = 10) -> nn.Sequential:
    """VGG16 for 32x32 images: group norm, dense layers 512-512-classes (15,253,578 parameters)."""
    layers: list[nn.Module] = []
    channels = 3
    for item in VGG16_CHANNELS:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, item, 3, padding=1), nn.GroupNorm(32, item), nn.ReLU()]
        channels = item
    layers += [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, classes))


class _Block(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, out)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inside != out:
            conv = nn.Conv2d(inside, out, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.GroupNorm(32, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two convolutions and the short cut."""
        h = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(h + self.short(x))


def resnet18(classes: int = 10) -> nn.Sequential:
    """ResNet18 for 32x32 images, group norm."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    blocks, channels = [], 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [_Block(channels, out, stride), _Block(out, out, 1)]
        channels = out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*stem, *blocks, *head)


class CharLSTM(nn.Module):
    """Character model: embedding 8, two LSTM layers of 256, a dense head."""

    def __init__(self, vocabulary: int = 80, hidden: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.lstm = nn.LSTM(8, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, time, vocabulary)."""
        return self.head(self.lstm(self.embed(ids))[0])


def mlp(classes: int = 10) -> nn.Sequential:
    """The personalization experiments' net: two dense layers."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, classes))
