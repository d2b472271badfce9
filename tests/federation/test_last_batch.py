"""Batch norm, and last batches that are too small for it."""

import logging

import pytest
import torch
from tests.federation.test_batched import same
from tests.federation.test_trainer import arguments
from tests.zoo import adapted, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fedpara_peft import ClientDataError, FederatedTrainer
from fedpara_peft.federation.random import torch_generator


def client(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 8, generator=g).double(), torch.randint(0, 2, (n,), generator=g)
    )


def net(norm="batch"):
    torch.manual_seed(0)
    norms = {
        "batch": nn.BatchNorm1d(8),
        "stateless": nn.BatchNorm1d(8, track_running_stats=False),
        "group": nn.GroupNorm(2, 8),
    }
    return nn.Sequential(nn.Linear(8, 8), norms[norm], nn.Linear(8, 2)).double()


def by_hand(model, data, batches, args):
    """A client's epoch over batches of these sizes."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    order = torch.randperm(len(data), generator=torch_generator(args.seed, 0, 0, "batches 0"))
    for part in order[: sum(batches)].split(batches):
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0][part]), data.tensors[1][part]).backward()
        optimizer.step()
    return model


def run(folder, model, clients, **changes):
    args = arguments(
        folder, **{"num_rounds": 1, "num_local_epochs": 1, "clients_per_round": len(clients),
                   "per_client_batch_size": 16, "on_client_error": "raise",
                   "overwrite_output_dir": True, **changes}
    )  # fmt: skip
    trainer = FederatedTrainer(model, args, clients)
    return trainer, trainer.train(), args


@pytest.mark.parametrize(
    ("norm", "changes", "batches"),
    [
        ("batch", {}, [16, 17]),  # the last row joins the batch before it
        ("stateless", {}, [16, 17]),
        ("group", {}, [16, 16, 1]),  # needs no company
        ("batch", {"drop_last": True}, [16, 16]),
        ("group", {"drop_last": True}, [16, 16]),
        ("batch", {"per_client_batch_size": 5}, [5, 5, 5, 5, 5, 5, 3]),
        ("batch", {"per_client_batch_size": 5, "drop_last": True}, [5] * 6),
        ("batch", {"per_client_batch_size": 64, "drop_last": True}, [33]),  # the only one
    ],
)
def test_a_client_of_33_rows(tmp_path, norm, changes, batches):
    model = net(norm)
    _, _, args = run(tmp_path, model, [client(33)], **changes)
    expected = by_hand(net(norm), client(33), batches, args)
    for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("norm", ["stateless", "group"])
def test_both_engines_make_the_same_batches(tmp_path, norm, drop_last):
    clients = [client(33, seed) for seed in range(4)]
    changes = {"num_local_epochs": 2, "num_rounds": 2, "drop_last": drop_last}
    one = run(tmp_path / "a", net(norm), clients, engine="sequential", **changes)
    other = run(tmp_path / "b", net(norm), clients, engine="batched", **changes)
    same(one[:2], other[:2])


def test_batch_norm_in_evaluation_mode_asks_for_no_company(tmp_path):
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), Frozen(8), nn.Linear(8, 2)).double()

    model = build()
    _, _, args = run(tmp_path, model, [client(33)])
    expected = by_hand(build(), client(33), [16, 16, 1], args)
    torch.testing.assert_close(model[0].weight, expected[0].weight)


@pytest.mark.parametrize("engine", ["sequential", "auto", "batched"])
@pytest.mark.parametrize(
    ("clients", "changes"),
    [
        ({"ann": client(20), "bob": client(1), "cem": client(1)}, {}),
        ({"bob": client(4), "cem": client(4)}, {"per_client_batch_size": 1}),
    ],
)
def test_one_row_alone_is_refused_by_the_clients_name(tmp_path, clients, changes, engine):
    says = "client 'bob': batch norm cannot train on a batch of one row: raise per_client_batch"
    with pytest.raises(ClientDataError, match=says):
        run(tmp_path, net("stateless"), clients, engine=engine, **changes)
    if engine == "sequential":
        with pytest.raises(ClientDataError, match=says):
            run(tmp_path, net("batch"), clients, **changes)


def test_one_image_has_many_values_a_channel(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    images = TensorDataset(torch.randn(1, 1, 8, 8), torch.tensor([1]))
    _, history, _ = run(tmp_path, model, [images])
    assert history[0].train_loss > 0


@pytest.mark.parametrize(
    ("build", "settings", "told"),
    [
        (mlp, {}, True),
        (lambda: adapted(mlp()), {}, True),
        (lambda: mlp(norm=False), {}, False),
        (mlp, {"local_modules": ["1"]}, False),  # FedBN
        (lambda: adapted(mlp(), base_weight="frozen"), {}, False),  # not sent
    ],
)
def test_batch_norm_is_told_of_once(tmp_path, caplog, build, settings, told):
    data = TensorDataset(torch.randn(20, 16), torch.randint(0, 4, (20,)))
    args = arguments(tmp_path, **settings)
    with caplog.at_level(logging.WARNING):
        FederatedTrainer(build(), args, [data] * 3).train()
    said = [r.getMessage() for r in caplog.records if "statistics are averaged" in r.getMessage()]
    assert len(said) == told
    assert all("group norm" in text and "local_modules" in text for text in said)
