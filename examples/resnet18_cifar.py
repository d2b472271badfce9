r"""ResNet18 with group norm on CIFAR-10, CIFAR-100 or CINIC-10.

    python examples/resnet18_cifar.py --output_dir outputs/resnet18 --smoke True
    python examples/resnet18_cifar.py --output_dir outputs/resnet18 --save_every 10
    accelerate launch examples/resnet18_cifar.py --output_dir outputs/resnet18-skewed \
        --split dirichlet --num_local_epochs 5 --strategy Scaffold

These take a GPU; ``--width 0.25`` and the options in vgg16_cifar.py suit a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from vision import run


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the image's size, but for its stride, and its norm."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    # He's variance, which a factorized convolution starts with as well.
    nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(layer, nn.GroupNorm(math.gcd(32, outputs), outputs))


class Block(nn.Module):
    """Two convolutions and a short cut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, smaller or deeper images out."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.short(x))


def resnet18(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """A stem, eight blocks and a dense layer; all twenty convolutions are factorized."""
    channels = round(64 * width)
    layers = [convolution(3, channels, 3), nn.ReLU()]
    for stage in range(4):
        outputs = round(64 * 2**stage * width)
        layers += [Block(channels, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        channels = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)


if __name__ == "__main__":
    run("ResNet18", resnet18)
