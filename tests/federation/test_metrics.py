"""What ``compute_metrics`` may return, and what becomes of it."""

import json
import math

import numpy as np
import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import mlp
from torch import nn
from torch.utils.data import TensorDataset
from transformers import EvalPrediction

from fedpara_peft import (
    ArgumentsError,
    ClientDataError,
    FederatedTrainer,
    History,
    accuracy,
    partition,
)
from fedpara_peft.federation.client.evaluation import named_metrics, over_clients

CLIENTS = partition(toy(), "iid", 4)


def trained(folder, compute_metrics, **changes):
    args = arguments(folder, num_rounds=1, **changes)
    trainer = FederatedTrainer(
        mlp(norm=False), args, CLIENTS, toy(), compute_metrics=compute_metrics,
        client_eval_dataset=CLIENTS,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    return trainer


def strictly(path):
    """A JSON file, read as the standard has it."""

    def no(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=no)


def test_metrics_without_anything_to_evaluate_are_refused(tmp_path):
    with pytest.raises(ArgumentsError, match="nothing to evaluate: give eval_dataset or"):
        FederatedTrainer(mlp(), arguments(tmp_path), CLIENTS, compute_metrics=accuracy)
    by_hand = FederatedTrainer(
        mlp(), arguments(tmp_path, eval_every=0), CLIENTS, compute_metrics=accuracy
    )
    assert "eval_accuracy" in by_hand.evaluate(toy())


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (0.5, {"metric": 0.5}),
        (np.float32(0.5), {"metric": 0.5}),
        (torch.tensor(2), {"metric": 2.0}),
        ({"f1": {"micro": 0.5, "of": {"a": 1}}, "n": 3}, {"f1_micro": 0.5, "f1_of_a": 1, "n": 3}),
        ({}, {}),
    ],
)
def test_numbers_bare_and_nested(found, expected):
    assert named_metrics(found) == expected


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "returned None as 'metric': return numbers by name"),
        ({"f1": "high"}, "returned 'high' as 'f1'"),
        ({"f1": {"a": np.zeros(2)}}, r"array\(\[0., 0.\]\) as 'a'"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path, found, says):
    with pytest.raises(ArgumentsError, match=says):
        trained(tmp_path, lambda _: found)


def test_a_bare_number_is_reported_as_metric(tmp_path):
    trainer = trained(tmp_path, lambda p: accuracy(p)["accuracy"])
    found = trainer.history[-1].metrics
    named = trained(tmp_path, accuracy).history[-1].metrics
    assert found["eval_metric"] == named["eval_accuracy"]
    assert found["client_metric_worst_decile"] == named["client_accuracy_worst_decile"]


@pytest.mark.parametrize("first", [True, False])
def test_a_metric_that_some_clients_lack_is_of_the_others(tmp_path, first):
    calls = []

    def compute(prediction):
        calls.append(None)
        lacks = len(calls) == (2 if first else 4)  # the first call is the global model's
        return {"auc": len(calls)} if not lacks else {}

    report = trained(tmp_path, compute).history[-1]
    expected = [3, 4, 5] if first else [2, 3, 5]
    given = report.client_metrics["auc"]
    assert list(given.values()) == expected
    assert {0, 1, 2, 3} - given.keys() == {0 if first else 2}
    assert report.metrics["client_auc_mean"] == pytest.approx(np.mean(expected))
    assert report.metrics["client_auc_worst_decile"] == min(expected)
    strictly(tmp_path / "history.json")


def test_what_is_not_a_number_stays_valid_json_and_comes_back(tmp_path):
    values = iter([math.nan, 1.0, math.nan, math.inf, 2.0])
    trainer = trained(tmp_path, lambda _: {"auc": next(values)}, save_every=1)
    report = trainer.history[-1]
    assert all(math.isnan(report.metrics[f"client_auc_{n}"]) for n in ("mean", "std"))
    row = strictly(tmp_path / "history.json")[0]
    assert row["metrics"]["eval_auc"] == "nan"
    assert row["client_metrics"]["auc"] == [[0, 1.0], [1, "nan"], [2, "inf"], [3, 2.0]]
    strictly(tmp_path / "checkpoint-1" / "trainer_state.json")
    for history in (
        History.load(tmp_path / "history.json"),
        trained(tmp_path, accuracy, save_every=1).history,  # resumed when it was over
    ):
        found = history[-1]
        assert math.isnan(found.metrics["eval_auc"])
        assert found.metrics["eval_loss"] == report.metrics["eval_loss"]
        assert [found.client_metrics["auc"][i] for i in (0, 2, 3)] == [1.0, math.inf, 2.0]
        assert math.isnan(found.client_metrics["auc"][1])
        assert history.bytes_to_target("eval_auc", 0.5) is None


@pytest.mark.parametrize("higher", [True, False])
def test_one_broken_client_shows_in_every_spread(higher):
    found = over_clients([0.1, math.nan, 0.3], higher)
    assert all(math.isnan(value) for value in found.values())


def test_accuracy_counts_what_counts():
    logits = np.array([[2.0, 1, 0], [0, 1, 2], [0, 2, 1]])
    assert accuracy(EvalPrediction(logits, np.array([0, 2, 0])))["accuracy"] == 2 / 3
    assert accuracy(EvalPrediction(logits, np.array([[0], [2], [0]])))["accuracy"] == 2 / 3
    assert accuracy(EvalPrediction(logits, np.array([0, -100, 0])))["accuracy"] == 1 / 2
    assert math.isnan(accuracy(EvalPrediction(logits, np.full(3, -100)))["accuracy"])
    with pytest.raises(ArgumentsError, match=r"accuracy needs .* got \(3, 3\) and \(2,\)"):
        accuracy(EvalPrediction(logits, np.array([0, 1])))


def test_sequences_of_other_lengths_in_every_batch(tmp_path):
    """Padded with -100 to the longest, as transformers does."""
    g = torch.Generator().manual_seed(0)
    rows = [(torch.randn(n, 8, generator=g), torch.randint(0, 3, (n,), generator=g)) for n in
            (2, 5, 7, 3, 7)]  # fmt: skip

    def collate(items):
        x = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
        y = nn.utils.rnn.pad_sequence([y for _, y in items], batch_first=True, padding_value=-100)
        return x, y

    torch.manual_seed(0)
    net = nn.Linear(8, 3)
    args = arguments(tmp_path, clients_per_round=1, eval_batch_size=2)
    trainer = FederatedTrainer(net, args, [rows], rows, collate, compute_metrics=accuracy)
    right = torch.cat([net(x).argmax(1) == y for x, y in rows]).double().mean()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(float(right))


def test_metrics_read_the_labels_that_the_loss_reads(tmp_path):
    x, y = toy().tensors
    rows = [{"x": a, "kind": int(b), "y": 0} for a, b in zip(x, y, strict=True)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x, y):
            return self.layer(x)

    torch.manual_seed(0)
    net = Net()
    args = arguments(tmp_path, clients_per_round=1, label_column="kind", num_rounds=1)
    trainer = FederatedTrainer(net, args, [rows], rows, compute_metrics=accuracy)
    trainer.train()
    right = float((net.layer(x).argmax(1) == y).double().mean())
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right)


def test_errors_of_evaluation_name_the_client(tmp_path):
    bad = TensorDataset(torch.randn(6, 16), torch.randn(6, 1))
    clients = {"ann": CLIENTS[0], "bob": CLIENTS[1]}
    held_out = {"ann": CLIENTS[2], "bob": bad}
    args = arguments(tmp_path, clients_per_round=2)
    trainer = FederatedTrainer(mlp(norm=False), args, clients, client_eval_dataset=held_out)
    with pytest.raises(ClientDataError, match=r"client 'bob': labels are torch\.float32"):
        trainer.train()
