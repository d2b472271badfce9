"""Small models and inputs that several tests use."""

import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpara_peft import FedParaConfig


class Net(nn.Module):
    """One of each layer kind, a batch norm with buffers, and a head that stays dense."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.embed = nn.Embedding(20, 32)
        self.rnn = nn.LSTM(32, 32, 2, batch_first=True)
        self.hidden = nn.Linear(32, 48)
        self.head = nn.Linear(48, 2)

    def forward(self, images, ids):
        features = self.norm(self.conv(images)).mean((2, 3))
        sequence, _ = self.rnn(self.embed(ids))
        return self.head(torch.relu(self.hidden(features + sequence[:, -1])))


def net_inputs(batch=5):
    return torch.randn(batch, 3, 6, 6), torch.randint(0, 20, (batch, 7))


class LoraKinds(nn.Module):
    """What LoRA has a form for; takes :data:`LORA_IDS`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12, padding_idx=0)
        self.one = nn.Conv1d(12, 10, 3, padding=1)
        self.two = nn.Conv2d(10, 9, (3, 2), padding=1)
        self.old = Conv1D(8, 9)
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.one(self.embed(ids).transpose(1, 2))
        x = self.two(x.unsqueeze(-1)).mean((2, 3))
        return self.head(self.old(x))


LORA_IDS = torch.tensor([[0, 3, 5], [10, 0, 1]])


def mlp(seed=0, width=32, norm=True):
    torch.manual_seed(seed)
    layers = [nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    if norm:
        layers.insert(1, nn.BatchNorm1d(width))
    return nn.Sequential(*layers, nn.Linear(width, 4))


def adapted(model, **config):
    """The model with FedPara on everything, replaced weights by default."""
    config = {"base_weight": "replaced", "target_modules": "all-supported", "r": 3, **config}
    return get_peft_model(model, FedParaConfig(**config))


def randomize(model, std=0.3):
    """Move every factor and every bias and norm away from its initial value."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "fedpara_" in name:
                p.normal_(0, std)
            elif p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if b.is_floating_point() and "running" in name:
                b.uniform_(0.5, 1.5)
    return model
