r"""VGG16 with group norm on CIFAR-10, CIFAR-100 or CINIC-10, as in the paper.

    python examples/vgg16_cifar.py --output_dir outputs/vgg16 --smoke True
    python examples/vgg16_cifar.py --output_dir outputs/vgg16 --save_every 10
    python examples/vgg16_cifar.py --output_dir outputs/vgg16-skewed \
        --split dirichlet --num_local_epochs 5 --strategy FedDyn
    python examples/vgg16_cifar.py --output_dir outputs/vgg16-100 \
        --data uoft-cs/cifar100 --gamma 0.4 --num_clients 50 --num_rounds 400
    accelerate launch examples/vgg16_cifar.py --output_dir outputs/vgg16-low --method lowrank

These take a GPU. On two CPU cores a narrow net learns in minutes:

    python examples/vgg16_cifar.py --output_dir outputs/narrow --width 0.25 --examples 10000 \
        --num_clients 10 --clients_per_round 4 --num_rounds 25 --num_local_epochs 2 \
        --per_client_batch_size 32 --eval_every 5
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from vision import run

CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Thirteen convolutions, all factorized, and three dense layers, 512-512-classes."""
    return vgg(CHANNELS, classes, width, hidden=2)


def vgg(
    stages: Sequence[Sequence[int]], classes: int, width: float = 1.0, hidden: int = 0
) -> nn.Sequential:
    """Stages of convolutions, each halving the image, which must be down to one pixel then."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in stages:
        for channels in stage:
            outputs = round(channels * width)
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
            # He's variance, which a factorized convolution starts with as well.
            nn.init.kaiming_normal_(convolution.weight)
            layers += [convolution, nn.GroupNorm(math.gcd(32, outputs), outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(hidden):
        layers += [nn.Linear(inputs, inputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


if __name__ == "__main__":
    run("VGG16", vgg16)
