"""A data set makes its own rows: subclasses, transforms and collators are never gone past."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset as Rows
from tests.federation.test_trainer import arguments as of_trainer
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from fedpara_peft import ClientDataError, FederatedTrainer, PartitionError, accuracy, partition
from fedpara_peft.federation.data.batches import batch_sizes, batches

G = torch.Generator().manual_seed(0)
X = torch.randn(60, 8, generator=G)
Y = (X[:, 0] > 0).long()
BASE = TensorDataset(X, Y)


def arguments(folder, **changes):
    return of_trainer(folder, overwrite_output_dir=True, **changes)


class Masked(Subset):
    """Inputs are hidden, and labels are all 1."""

    def __getitem__(self, i):
        x, _ = self.dataset[self.indices[i]]
        return torch.zeros_like(x), torch.tensor(1)

    def __getitems__(self, indices):
        return [self[i] for i in indices]


class MaskedTensors(TensorDataset):
    def __getitem__(self, i):
        x, _ = super().__getitem__(i)
        return torch.zeros_like(x), torch.tensor(1)


class MaskedRows(Rows):
    def __getitem__(self, key):
        row = super().__getitem__(key)
        zeros = np.zeros_like(row["x"]).tolist()
        return {"x": zeros, "label": 1 if isinstance(key, int) else [1] * len(zeros)}

    # Rows.__getitems__ calls self.__getitem__ with a list; it stays.


def masked_rows():
    rows = Rows.from_dict({"x": X.tolist(), "label": Y.tolist()})
    return MaskedRows(rows.data, info=rows.info, split=rows.split)


def with_transform():
    rows = Rows.from_dict({"x": X.tolist(), "label": Y.tolist()})
    return rows.with_transform(
        lambda batch: {"x": [[0.0] * 8 for _ in batch["x"]], "label": [1 for _ in batch["x"]]}
    )


def with_instance_getitems():
    masked = Subset(BASE, range(60))
    masked.__getitems__ = lambda indices: [(torch.zeros(8), torch.tensor(1)) for _ in indices]
    return masked


class OnlyGetItem(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, i):
        return torch.zeros(8), torch.tensor(1)


MASKED = {
    "a Subset's subclass": lambda: Masked(BASE, range(60)),
    "a TensorDataset's subclass": lambda: MaskedTensors(X, Y),
    "a part of a Subset's subclass": lambda: Subset(Masked(BASE, range(60)), range(60)),
    "a part of a part": lambda: Subset(Subset(MaskedTensors(X, Y), range(60)), range(60)),
    "datasets' subclass": masked_rows,
    "datasets with a transform": with_transform,
    "__getitems__ of the instance": with_instance_getitems,
    "a part of such an instance": lambda: Subset(with_instance_getitems(), range(60)),
    "a class of one's own": OnlyGetItem,
}


@pytest.mark.parametrize("engine", ["sequential", "auto"])
@pytest.mark.parametrize("name", MASKED)
def test_training_and_evaluation_see_what_a_dataloader_sees(tmp_path, name, engine):
    torch.manual_seed(0)
    net = nn.Linear(8, 2)
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    args = arguments(tmp_path, num_rounds=1, engine=engine, clients_per_round=8)
    data = MASKED[name]()
    trainer = FederatedTrainer(net, args, [data] * 8, data, compute_metrics=accuracy)
    found = trainer.train()[-1].metrics
    assert torch.equal(net.weight, weight)  # inputs are 0, so the weight has no gradient
    assert net.bias[1] - net.bias[0] > bias[1] - bias[0] + 0.1
    loss = nn.functional.cross_entropy(net.bias.detach(), torch.tensor(1))
    assert found["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["eval_accuracy"] == float(net.bias[1] > net.bias[0])


@pytest.mark.parametrize("name", MASKED)
def test_partition_reads_the_labels_of_the_rows(name):
    """All labels are 1, though the data underneath has two classes."""
    data = MASKED[name]()
    with pytest.raises(PartitionError, match=r"classes must be in \[1, 1\], got 2"):
        partition(data, "classes_per_client", 3, classes=2)
    assert sum(len(c) for c in partition(data, "classes_per_client", 3, classes=1)) == 60


def test_a_subset_whose_subclass_changes_only_one_way_of_reading():
    """torch refuses to make one; made by hand, all reading goes through what was changed."""

    class Half(Subset):
        def __getitem__(self, i):
            x, y = self.dataset[self.indices[i]]
            return 0 * x, y

    half = Half.__new__(Half)
    half.dataset, half.indices = BASE, range(60)
    for data in (half, Subset(half, range(10))):
        assert all(float(batch[0].abs().max()) == 0 for batch, _ in batches(data, 7))


def test_plain_tensors_are_read_as_their_rows_are():
    part = Subset(Subset(BASE, range(10, 60)), [3, 1, 4, 15, 9, 2, 6])
    seen = torch.cat([batch[0] for batch, _ in batches(part, 3)])
    assert torch.equal(seen, torch.stack([part[i][0] for i in range(7)]))
    shares = [[float(b[0][0, 0]) for b, _ in batches(part, 2, share=(i, 3))] for i in range(3)]
    every = [float(b[0][0, 0]) for b, _ in batches(part, 2)]
    assert [shares[0][0], shares[1][0], shares[2][0], shares[0][1]] == every


@pytest.mark.parametrize("engine", ["sequential", "auto"])
def test_a_collator_is_used_by_every_engine(tmp_path, engine):
    def zeros(rows):
        x, y = default_collate(rows)
        return torch.zeros_like(x), y

    torch.manual_seed(0)
    net = nn.Linear(8, 2)
    before = net.weight.detach().clone()
    args = arguments(tmp_path, num_rounds=1, engine=engine, clients_per_round=10)
    FederatedTrainer(net, args, partition(BASE, "iid", 10), data_collator=zeros).train()
    assert torch.equal(net.weight, before)


class Named(Dataset):
    """``targets``, as torchvision has them, and rows that may say something else."""

    def __init__(self, target_transform=None, flips=False):
        self.targets = Y.tolist()
        self.target_transform, self.flips = target_transform, flips
        self.read = 0

    def __len__(self):
        return 60

    def __getitem__(self, i):
        self.read += 1
        label = self.targets[i]
        label = self.target_transform(label) if self.target_transform else label
        return X[i], 1 if self.flips else label


def test_targets_are_believed_only_where_the_rows_agree():
    plain = Named()
    assert len(partition(plain, "classes_per_client", 4, classes=1)) == 4
    assert plain.read <= 16  # a look at some, not at all
    for odd in (Named(target_transform=lambda _: 1), Named(flips=True)):
        with pytest.raises(PartitionError, match=r"in \[1, 1\]"):
            partition(odd, "classes_per_client", 4, classes=2)


def test_reading_labels_leaves_the_callers_generators_alone():
    class Noisy(OnlyGetItem):
        def __getitem__(self, i):
            return torch.randn(8), np.random.randint(3)

    torch.manual_seed(0)
    np.random.seed(0)
    first = partition(Noisy(), "dirichlet", 3, concentration=5.0)
    drawn = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert drawn == (torch.rand(1), np.random.rand())
    again = partition(Noisy(), "dirichlet", 3, concentration=5.0)
    assert [c.indices for c in again] == [c.indices for c in first]


@pytest.mark.parametrize("column", ["labels", "label", "y", "target", "class", "fine_label"])
def test_partition_and_loss_find_labels_by_the_same_names(tmp_path, column):
    rows = Rows.from_dict({"inputs": X.tolist(), column: Y.tolist()})
    clients = partition(rows, "classes_per_client", 2, classes=1)
    trained, expected = nn.Linear(8, 2), nn.Linear(8, 2)
    expected.load_state_dict(trained.state_dict())
    args = arguments(tmp_path, num_rounds=1, clients_per_round=2)
    FederatedTrainer(trained, args, clients, rows, compute_metrics=accuracy).train()
    pairs = [TensorDataset(torch.tensor(c["inputs"]), torch.tensor(c[column])) for c in clients]
    FederatedTrainer(expected, args, pairs).train()
    assert torch.equal(trained.weight, expected.weight)


def test_two_columns_that_may_be_labels_are_asked_about(tmp_path):
    rows = Rows.from_dict({"x": X.tolist(), "fine_label": Y.tolist(), "coarse_label": Y.tolist()})
    with pytest.raises(PartitionError, match=r"\['fine_label', 'coarse_label'\].*label_column"):
        partition(rows, "dirichlet", 2)
    clients = partition(rows, "classes_per_client", 2, classes=1, label_column="coarse_label")
    args = arguments(tmp_path, num_rounds=1, clients_per_round=2, on_client_error="raise")
    with pytest.raises(ClientDataError, match=r"client 0: any of the columns"):
        FederatedTrainer(nn.Linear(8, 2), args, clients).train()
    args = dataclasses.replace(args, label_column="fine_label")
    with pytest.raises(ClientDataError, match=r"leave \['coarse_label', 'x'\] out"):
        FederatedTrainer(nn.Linear(8, 2), args, clients).train()
    clients = [c.remove_columns("coarse_label") for c in clients]
    FederatedTrainer(nn.Linear(8, 2), args, clients, clients[0], compute_metrics=accuracy).train()


def test_a_label_column_under_any_name(tmp_path):
    rows = Rows.from_dict({"x": X.tolist(), "diagnosis": Y.tolist()})
    assert partition(rows, "classes_per_client", 2, classes=1, label_column="diagnosis")
    args = arguments(tmp_path, num_rounds=1, clients_per_round=1, on_client_error="raise")
    with pytest.raises(ClientDataError, match=r"no labels \(\['diagnosis', 'x'\]\).*label_column"):
        FederatedTrainer(Pair(), args, [rows]).train()
    args = dataclasses.replace(args, label_column="diagnosis")
    FederatedTrainer(nn.Linear(8, 2), args, [rows], rows, compute_metrics=accuracy).train()
    args = dataclasses.replace(args, label_column="diagnose")
    with pytest.raises(ClientDataError, match=r"no column 'diagnose', there are .*'diagnosis'"):
        FederatedTrainer(nn.Linear(8, 2), args, [rows]).train()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x, diagnosis):
        return self.layer(x)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(BASE)


class NoLength(Dataset):
    def __getitem__(self, i):
        return BASE[i]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Stream, "is a Stream, whose rows cannot be read by index: give a map-style"),
        (lambda: iter(BASE), "cannot be read by index"),
        (lambda: Rows.from_dict({"x": [1]}).to_iterable_dataset(), "cannot be read by index"),
        (lambda: DataLoader(BASE, 4), "is a DataLoader: give its dataset"),
        (NoLength, "is a NoLength without a length: give it a __len__"),
        (lambda: (X, Y), r"is a tuple of 2 tensors.*TensorDataset\(\*tensors\)"),
        (lambda: {"x": X, "y": Y}, "is a dict, which holds columns, not rows"),
        (lambda: pd.DataFrame({"x": [1], "y": [0]}), "is a DataFrame, which holds columns"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(tmp_path, make, says):
    args = arguments(tmp_path, clients_per_round=1)
    with pytest.raises(ClientDataError, match=f"client 'ann': the data .*{says}"):
        FederatedTrainer(nn.Linear(8, 2), args, {"ann": make()})
    with pytest.raises(ClientDataError, match=f"client 'ann': the data .*{says}"):
        FederatedTrainer(nn.Linear(8, 2), args, {"ann": BASE}, client_eval_dataset={"ann": make()})
    with pytest.raises(ClientDataError, match=says):
        FederatedTrainer(nn.Linear(8, 2), args, {"ann": BASE}).evaluate(make())
    with pytest.raises(PartitionError, match=says):
        partition(make(), "iid", 1)


def test_splits_are_no_clients(tmp_path):
    rows = Rows.from_dict({"x": X.tolist(), "label": Y.tolist()})
    splits = rows.train_test_split(0.2)
    with pytest.raises(
        ClientDataError, match=r"\['train', 'test'\], which are splits, not clients"
    ):
        FederatedTrainer(nn.Linear(8, 2), arguments(tmp_path), splits)
    with pytest.raises(PartitionError, match=r"of the splits \['train', 'test'\]: give one"):
        partition(splits, "iid", 2)


def test_a_list_of_rows_is_a_data_set(tmp_path):
    rows = list(BASE)
    clients = partition(rows, "dirichlet", 2, concentration=5.0)
    args = arguments(tmp_path, num_rounds=1, clients_per_round=2)
    FederatedTrainer(nn.Linear(8, 2), args, clients, rows).train()


@pytest.mark.parametrize(
    ("rows", "size", "last", "sizes"),
    [
        (9, 3, "keep", [3, 3, 3]),
        (10, 3, "keep", [3, 3, 3, 1]),
        (10, 3, "merge", [3, 3, 4]),
        (11, 3, "merge", [3, 3, 3, 2]),
        (1, 3, "merge", [1]),
        (3, 1, "merge", [1, 1, 1]),
        (11, 3, "drop", [3, 3, 3]),
        (2, 3, "drop", [2]),
    ],
)
def test_sizes_of_batches(rows, size, last, sizes):
    assert batch_sizes(rows, size, last) == sizes
    data = Subset(BASE, range(rows))
    for same in (data, list(data)):
        found = list(batches(same, size, last=last, generator=torch.Generator().manual_seed(1)))
        assert [count for _, count in found] == [len(batch[1]) for batch, _ in found] == sizes
