"""Runs of two processes that were given different things: ``agreement.py FOLDER``.

Writes what became of each, on every process.
"""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset, TensorDataset, random_split

from fedpara_peft import (
    FedAvg,
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedProx,
    partition,
)


def whole():
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 0).long())


class Broken(Dataset):
    """Cannot be read beyond its ends and middle on one process."""

    def __init__(self, data, here):
        self.data, self.here = data, here

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if self.here and i == 8:
            raise OSError("row 8 is gone")
        return self.data[i]


class Drawing(Broken):
    """A transform that draws from every global generator."""

    def __getitem__(self, i):
        x, y = self.data[i]
        return x + torch.rand(8) + random.random() + float(np.random.rand()), y


class Raises(FederatedCallback):
    def on_round_end(self, server, report):
        raise RuntimeError("the callback broke")


class TwoPartNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(8, width), nn.Linear(width, 2)
        self.a.requires_grad_(False)  # a frozen base, another one in every process
        self.register_buffer("scale", torch.rand(1), persistent=False)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) * self.scale


def case(name, index, folder):
    """What the script of this name gives its trainer in process ``index``."""
    torch.manual_seed(index)  # nothing is seeded alike
    random.seed(index)
    np.random.seed(index)
    data, model, strategy, extra, callbacks = whole(), nn.Linear(8, 2), None, {}, []
    clients = list(partition(data, "iid", 4))
    held_out = data
    if name == "frozen base":
        model = TwoPartNet(4)
    elif name == "architecture":
        model = nn.Linear(8, 2, bias=index == 0)
    elif name == "trainable":
        model.bias.requires_grad_(index == 0)
    elif name == "sizes":
        clients = list(random_split(data, [20 + index, 40 - index]))
    elif name == "rows":
        clients = list(random_split(data, [20, 40]))
    elif name == "names":
        clients = dict(zip(["ann", "bob"][:: 1 - 2 * index], clients, strict=False))
    elif name == "arguments":
        extra = {"learning_rate": 0.1 * (index + 1)}
    elif name == "folder":
        extra = {"output_dir": str(folder / f"other-{index}")}
    elif name == "strategy":
        strategy = FedProx(0.1) if index else FedAvg()
    elif name == "eval":
        held_out = next(iter(random_split(data, [30, 30])))
    elif name == "transforms":
        clients = [Drawing(c, False) for c in clients]
    elif name == "eval row":
        held_out = Broken(data, index == 1)
        extra = {"eval_batch_size": 5}
    elif name == "client row":
        clients = [Broken(c, index == 1) for c in clients]
        extra = {"on_client_error": "raise"}
    elif name == "callback":
        callbacks = [Raises()]
    else:
        assert name == "model"
    args = {"output_dir": str(folder / name), "num_rounds": 2, "disable_tqdm": True, **extra}
    return FederatedTrainer(
        model, FederatedArguments(**args), clients, held_out, strategy=strategy,
        callbacks=callbacks,
    )  # fmt: skip


CASES = (
    "model", "frozen base", "transforms", "architecture", "trainable", "sizes", "rows", "names",
    "arguments", "folder", "strategy", "eval", "eval row", "client row", "callback", "model again",
)  # fmt: skip


def main():
    folder = Path(sys.argv[1])
    index = int(os.environ["RANK"])
    found = {}
    for name in CASES:
        try:
            trainer = case(name.removesuffix(" again"), index, folder / ("2" * ("again" in name)))
            trainer.train()
            values = [*trainer.model.parameters(), *trainer.model.buffers()]
            found[name] = [v.flatten().tolist() for v in values] + [trainer.evaluate()]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    (folder / f"process-{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
