"""Partitions cover the data once, follow their law and say what they cannot do."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from fedpara_peft import PartitionError, partition

LABELS = np.repeat(np.arange(5), 40)
DATA = TensorDataset(torch.arange(200.0), torch.tensor(LABELS))
ROWS = Dataset.from_dict({"x": list(range(200)), "label": LABELS.tolist()})


def labelled(*labels):
    return Dataset.from_dict({"x": [0.0] * len(labels), "label": labels})


def values(client):
    return [int(row[0]) if isinstance(row, tuple) else row["x"] for row in client]


@pytest.mark.parametrize("data", [DATA, ROWS], ids=["torch", "datasets"])
@pytest.mark.parametrize(("scheme", "args"), [("iid", {}), ("dirichlet", {"concentration": 1.0})])
def test_every_example_once_and_reproducible(data, scheme, args):
    clients = partition(data, scheme, 7, seed=3, **args)
    assert len(clients) == 7
    assert sorted(v for c in clients for v in values(c)) == list(range(200))
    again, other = (partition(data, scheme, 7, seed=s, **args) for s in (3, 4))
    assert [values(c) for c in again] == [values(c) for c in clients]
    assert [values(c) for c in other] != [values(c) for c in clients]


def test_a_part_of_a_data_set_brings_its_labels():
    part = Subset(DATA, list(range(80, 200)))  # classes 2, 3 and 4
    clients = partition(part, "classes_per_client", 3, classes=1)
    held = [{int(label) for _, label in client} for client in clients]
    assert sorted(held, key=min) == [{2}, {3}, {4}]


def test_iid_sizes_differ_by_one_at_most():
    sizes = {len(c) for c in partition(DATA, "iid", 7)}
    assert max(sizes) - min(sizes) <= 1


@given(st.floats(0.01, 20), st.integers(1, 30), st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:.*clients drew fewer")
def test_dirichlet_leaves_nobody_empty(concentration, num_clients, seed):
    clients = partition(DATA, "dirichlet", num_clients, seed, concentration=concentration)
    assert min(len(c) for c in clients) >= 1
    assert sum(len(c) for c in clients) == 200


@pytest.mark.filterwarnings("ignore:.*clients drew fewer")
def test_concentration_sets_the_skew():
    def skew(concentration):
        clients = partition(DATA, "dirichlet", 10, concentration=concentration)
        shares = [np.bincount(LABELS[values(c)], minlength=5).max() / len(c) for c in clients]
        return np.mean(shares)

    assert skew(0.05) > 0.75 > 0.35 > skew(100)


def test_filling_up_is_said():
    with pytest.warns(UserWarning, match="drew fewer than 5 examples"):
        clients = partition(DATA, "dirichlet", 10, concentration=0.05, min_examples=5)
    assert min(len(c) for c in clients) == 5


@given(st.integers(5, 40), st.integers(1, 5), st.integers(0, 50))
def test_classes_per_client(num_clients, classes, seed):
    clients = partition(DATA, "classes_per_client", num_clients, seed, classes=classes)
    assert sorted(v for c in clients for v in values(c)) == list(range(200))
    held = [set(LABELS[values(c)]) for c in clients]
    assert all(1 <= len(h) <= classes for h in held)


@pytest.mark.parametrize("data", [DATA, ROWS], ids=["torch", "datasets"])
@pytest.mark.filterwarnings("ignore:.*clients drew fewer")
def test_quantity_skews_sizes_only(data):
    sizes = [len(c) for c in partition(data, "quantity", 10, seed=2, concentration=0.3)]
    assert sum(sizes) == 200
    assert min(sizes) >= 1
    assert max(sizes) > 40


def test_a_client_per_value_of_a_column():
    roles = ["Nurse", "Romeo", "Juliet", "Romeo", "Romeo", "Nurse"]
    rows = Dataset.from_dict({"text": list("abcdef"), "role": roles})
    clients = partition(rows, "column", 2, column="role", min_examples=2)
    assert sorted(tuple(c["text"]) for c in clients) == [("a", "f"), ("b", "d", "e")]
    with pytest.raises(PartitionError, match="2 values with at least 2 examples, fewer than 3"):
        partition(rows, "column", 3, column="role", min_examples=2)
    with pytest.raises(PartitionError, match="needs column="):
        partition(rows, "column", 2)
    with pytest.raises(PartitionError, match=r"no column 'writer', it has .*role"):
        partition(rows, "column", 2, column="writer")
    with pytest.raises(PartitionError, match="no column 'role', it has no columns"):
        partition(DATA, "column", 2, column="role")


def test_a_partitioner_of_another_library():
    class Halves:
        num_partitions = 2

        def load_partition(self, i):
            return self.dataset.select(range(100 * i, 100 * i + (100 if i < self.full else 0)))

    halves = Halves()
    halves.full = 2
    assert [len(c) for c in partition(ROWS, halves, 2)] == [100, 100]
    with pytest.raises(PartitionError, match="give the same"):
        partition(ROWS, halves, 3)
    halves.full = 1
    with pytest.raises(PartitionError, match="left 1 clients empty"):
        partition(ROWS, halves, 2)


@pytest.mark.parametrize("concentration", [1e12, 1e308, math.inf])
@pytest.mark.parametrize("scheme", ["dirichlet", "quantity"])
def test_the_largest_concentrations_are_even(scheme, concentration):
    clients = partition(DATA, scheme, 4, concentration=concentration)
    assert [len(client) for client in clients] == [50] * 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: partition(DATA, "quantity", 3, min_examples=0), "min_examples of at least 1"),
        (lambda: partition(labelled(0, None, 1), "dirichlet", 2), "cannot be told apart.*NoneType"),
        (lambda: partition(labelled([0], [0, 1]), "classes_per_client", 2), "cannot be told apart"),
        (lambda: partition(labelled(), "classes_per_client", 2), "0 examples cannot give 2"),
        (lambda: partition(DATA, "sorted", 3), "unknown scheme 'sorted': use one of"),
        (lambda: partition(DATA, "classes_per_client", 2, classes=2), "cannot hold all 5"),
        (lambda: partition(DATA, "classes_per_client", 9, classes=6), r"in \[1, 5\], got 6"),
        (lambda: partition(DATA, "classes_per_client", 300), "use fewer clients"),
        (lambda: partition(DATA, "quantity", 3, concentration=-1), "must be positive"),
        (lambda: partition(DATA, "iid", 0), "num_clients must be at least 1"),
        (lambda: partition(DATA, "iid", 201), "use fewer clients"),
        (lambda: partition(DATA, "dirichlet", 50, min_examples=5), "use fewer clients"),
        (lambda: partition(DATA, "dirichlet", 3, concentration=0), "must be positive"),
        (lambda: partition(DATA, "dirichlet", 3, alpha=1), "unexpected keyword argument 'alpha'"),
        (lambda: partition(ROWS, "dirichlet", 3, label_column="y"), "give label_column"),
        (lambda: partition(list(range(9)), "dirichlet", 3), "give labels"),
        (lambda: partition(DATA, "dirichlet", 3, labels=[1, 2]), "one label per example"),
    ],
)
def test_errors_name_the_remedy(call, says):
    with pytest.raises(PartitionError, match=says):
        call()
