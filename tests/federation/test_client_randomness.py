"""All that a client draws depends on seed, round and client: also through NumPy and Python."""

import random

import numpy as np
import pytest
import torch
from tests.federation.test_trainer import arguments
from torch import nn
from torch.utils.data import Dataset, default_collate

from fedpara_peft import FederatedTrainer
from fedpara_peft.federation.random import seeded

DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": np.random.rand,
    "python": random.random,
}


class Noisy(Dataset):
    """Rows are moved by what a generator draws."""

    def __init__(self, draw, client):
        g = torch.Generator().manual_seed(client)
        self.x, self.draw = torch.randn(20, 8, generator=g), draw

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return self.x[i] + self.draw(), int(self.x[i, 0] > 0)


def trainer(folder, draw, where, rounds, **changes):
    torch.manual_seed(0)
    net = nn.Linear(8, 2)
    noisy = DRAWS[draw]
    quiet = lambda: 0.0  # noqa: E731
    clients = [Noisy(noisy if where == "rows" else quiet, i) for i in range(4)]

    def collate(rows):
        x, y = default_collate(rows)
        return x * (0.5 + noisy()), y

    args = arguments(
        folder, num_rounds=rounds, clients_per_round=2, eval_batch_size=6, save_every=2, **changes
    )
    return FederatedTrainer(
        net, args, clients, clients[0], collate if where == "collator" else None,
        client_eval_dataset=clients,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["rows", "collator"])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, draw, where):
    whole = trainer(tmp_path / "a", draw, where, 4)
    history = whole.train()
    trainer(tmp_path / "b", draw, where, 2).train()
    for generator in DRAWS.values():  # another process stands elsewhere
        generator()
    resumed = trainer(tmp_path / "b", draw, where, 4)
    again = resumed.train(resume_from_checkpoint=True)
    assert torch.equal(whole.model.weight, resumed.model.weight)
    assert [r.metrics for r in history] == [r.metrics for r in again]
    assert [r.train_loss for r in history] == [r.train_loss for r in again]


@pytest.mark.parametrize("draw", DRAWS)
def test_a_client_and_a_round_have_draws_of_their_own(tmp_path, draw):
    seen = []
    draws = DRAWS[draw]

    class Watched(Noisy):
        def __getitem__(self, i):
            seen.append(draws())
            return self.x[i], 0

    args = arguments(tmp_path, num_rounds=2, clients_per_round=2, num_local_epochs=1)
    FederatedTrainer(nn.Linear(8, 2), args, [Watched(None, i) for i in range(2)]).train()
    assert len(set(seen[-80:])) == 80  # before them, rows are read to tell the data's digest


@pytest.mark.parametrize("draw", DRAWS)
def test_the_callers_generators_go_on_as_if_nothing_was_trained(tmp_path, draw):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    one = trainer(tmp_path, draw, "rows", 1)
    before = [generator() for generator in DRAWS.values()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    one = trainer(tmp_path, draw, "rows", 1)
    one.train()
    one.evaluate()
    assert [generator() for generator in DRAWS.values()] == before


@pytest.mark.parametrize("draw", DRAWS)
def test_every_evaluation_sees_the_same(tmp_path, draw):
    one = trainer(tmp_path, draw, "rows", 1)
    assert one.evaluate() == one.evaluate()
    other = trainer(tmp_path, draw, "rows", 1, seed=1)
    assert one.evaluate() != other.evaluate()


def test_the_generator_of_an_apple_gpu_is_put_back(monkeypatch):
    state = {"now": torch.tensor([1])}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state["now"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.update(now=new))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: state.update(now=torch.tensor([2])))
    with seeded(5, torch.device("mps")):
        assert state["now"].item() == 2
    assert state["now"].item() == 1
