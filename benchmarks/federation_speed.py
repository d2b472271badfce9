"""Time of a federated round beside a plain hand-written loop and other simulators.

    python benchmarks/federation_speed.py

An MLP 784-200-10, 100 clients of 80 examples, 10 a round, batch 10, SGD, random data.
"""

from __future__ import annotations

import tempfile
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedpara_peft import FederatedArguments, FederatedTrainer


def data() -> list[TensorDataset]:
    torch.manual_seed(0)
    return [TensorDataset(torch.randn(80, 784), torch.randint(0, 10, (80,))) for _ in range(100)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


class Plain:
    """FedAvg as most people write it: DataLoader, new SGD, load_state_dict, averaged dicts."""

    def __init__(self, clients, epochs):
        self.clients, self.epochs, self.model = clients, epochs, net()

    def round(self, number):
        model = self.model
        start = {k: v.clone() for k, v in model.state_dict().items()}
        sums = {k: torch.zeros_like(v) for k, v in start.items()}
        cohort = torch.randperm(100, generator=torch.Generator().manual_seed(number))[:10].tolist()
        for i in cohort:
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(self.epochs):
                for x, y in DataLoader(self.clients[i], batch_size=10, shuffle=True):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
            for k, v in model.state_dict().items():
                sums[k] += v * (80 / 800)
        model.load_state_dict(sums)


class Ours:
    def __init__(self, clients, epochs):
        folder = tempfile.mkdtemp()
        args = FederatedArguments(
            folder,
            clients_per_round=10,
            num_local_epochs=epochs,
            per_client_batch_size=10,
            num_rounds=10**6,
            disable_tqdm=True,
        )
        self.trainer = FederatedTrainer(net(), args, clients)
        self.server, _ = self.trainer._start(False)

    def round(self, number):
        self.server, _ = self.trainer._round(self.server)


if __name__ == "__main__":
    import statistics

    torch.set_num_threads(1)
    for epochs in (5, 1):
        a, b = Plain(data(), epochs), Ours(data(), epochs)
        ratios = []
        for n in range(12):
            t0 = time.perf_counter()
            a.round(n)
            t1 = time.perf_counter()
            b.round(n)
            t2 = time.perf_counter()
            ratios.append((t2 - t1) / (t1 - t0))
        print(epochs, statistics.median(ratios), t1 - t0, t2 - t1)
    import cProfile
    import pstats

    pr = cProfile.Profile()
    pr.enable()
    for n in range(5):
        b.round(n)
    pr.disable()
    pstats.Stats(pr).sort_stats("tottime").print_stats(28)
