"""What a run costs: steps, examples or tokens a second, memory; and the trackers that are told."""

import io
import json
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.federation.made_up import made_up, sends
from tests.federation.test_trainer import arguments, toy
from tests.zoo import mlp
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import FederatedTrainer, History, accuracy, partition
from fedpara_peft.federation.observers import progress as bars
from fedpara_peft.federation.observers.measures import peak_memory_bytes
from fedpara_peft.federation.state import Outcome
from fedpara_peft.integrations.report import write_report


def trainer(folder, clients=None, **changes):
    settings = {"num_rounds": 3, "clients_per_round": 3, "num_local_epochs": 2, **changes}
    return FederatedTrainer(
        mlp(norm=False), arguments(folder, **settings), clients or partition(toy(), "iid", 3),
        toy(24), compute_metrics=accuracy,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_steps_and_examples_are_counted(tmp_path, engine):
    """Three clients of 40 rows, two epochs of five batches of eight."""
    for report in trainer(tmp_path, engine=engine).train():
        assert report.local_steps == 3 * 2 * 5
        assert report.terms == 3 * 2 * 40
        assert report.terms_per_s == pytest.approx(240 / report.seconds)


def test_only_tokens_that_count_are_counted(tmp_path):
    x = torch.randn(6, 5, 4)
    labels = torch.full((6, 5), -100)
    labels[:, :2] = 1  # two of five positions

    class PerPosition(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x).transpose(1, 2)

    run = FederatedTrainer(
        PerPosition(),
        arguments(tmp_path, num_rounds=1, clients_per_round=1, num_local_epochs=3),
        [TensorDataset(x, labels)],
    )
    (report,) = run.train()
    assert report.terms == 3 * 6 * 2


def test_who_does_not_tell_leaves_them_unknown(tmp_path):
    run, _ = made_up(tmp_path, lambda c, o: sends(c, o, steps=2, terms=8.0), num_rounds=1)
    (report,) = run.train()
    assert (report.local_steps, report.terms) == (10, 40.0)
    silent, _ = made_up(
        tmp_path / "b", lambda c, o: sends(c, o, steps=None if c == 2 else 2, terms=8.0),
        num_rounds=1,
    )  # fmt: skip
    (report,) = silent.train()
    assert (report.local_steps, report.terms) == (None, 40.0)


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(60_000_000 + before // 4)  # four bytes each: surely above the last peak
    after = peak_memory_bytes(torch.device("cpu"))
    assert after - before >= 150_000_000
    assert held.numel() * 4 < after < 100 * held.numel()


def test_reports_on_disk_and_the_page_tell_them(tmp_path):
    history = trainer(tmp_path).train()
    found = History.load(tmp_path / "history.json")
    for a, b in zip(history, found, strict=True):
        measured = (a.local_steps, a.terms, a.peak_memory_bytes)
        assert measured == (b.local_steps, b.terms, b.peak_memory_bytes)
        assert a.peak_memory_bytes > 50e6
    page = write_report(tmp_path).read_text()
    assert "720 examples, or tokens that count, in 90 local steps" in page
    assert "peak memory" in page
    rows = json.loads((tmp_path / "history.json").read_text())
    for row in rows:  # as an earlier version wrote them
        del row["local_steps"], row["terms"], row["peak_memory_bytes"]
    (tmp_path / "history.json").write_text(json.dumps(rows))
    page = write_report(tmp_path).read_text()
    assert "peak memory" not in page
    assert "local steps" not in page


def test_the_bars_show_clients_steps_and_speed(monkeypatch):
    """Within a long round: clients done and to come, steps a client, terms a second."""
    screen = io.StringIO()
    real = bars.tqdm
    monkeypatch.setattr(bars, "_LONG_S", 0.0)
    monkeypatch.setattr(
        bars, "tqdm", lambda **given: real(**given, file=screen, mininterval=0.0, ncols=200)
    )
    clock = iter(range(1000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    shown = bars.Progress(total=2, done=0, disable=False)
    for outcome in shown.within((Outcome(c, steps=4 + c, terms=100.0) for c in range(3)), 3):
        assert outcome.terms == 100
    shown.close()
    text = screen.getvalue()
    assert "3/3" in text
    assert "steps/client=5" in text  # (4 + 5 + 6) / 3
    assert "terms/s=" in text


#: What every round is told of, of a run that is evaluated.
TOLD = {
    "train_loss", "eval_loss", "eval_accuracy", "uplink_bytes", "downlink_bytes", "refused",
    "dropped", "seconds", "slowest_client_s", "local_steps", "terms_per_s", "peak_memory_bytes",
}  # fmt: skip


def test_tensorboard_gets_every_rounds_numbers(tmp_path):
    history = trainer(tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "federated")).Reload()
    assert set(events.Tags()["scalars"]) == TOLD
    for name in TOLD:
        told = events.Scalars(name)
        assert [e.step for e in told] == [1, 2, 3]
        expected = [expected_of(r, name) for r in history]
        assert [e.value for e in told] == pytest.approx(expected, rel=1e-6)


def expected_of(report, name):
    value = report.metrics.get(name)
    value = getattr(report, name) if value is None else value
    return len(value) if isinstance(value, tuple) else value


def test_wandb_writes_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer(tmp_path, report_to="wandb").train()
    (file,) = tmp_path.rglob("run-*.wandb")
    written = file.read_bytes()
    for name in TOLD:
        assert name.encode() in written, name
    assert "wandb" not in os.listdir()


def test_mlflow_writes_every_rounds_numbers(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.chdir(tmp_path)
    history = trainer(tmp_path, report_to="mlflow").train()
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (run,) = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    for name in TOLD:
        told = client.get_metric_history(run.info.run_id, name)
        assert [m.step for m in told] == [1, 2, 3]
        assert [m.value for m in told] == pytest.approx([expected_of(r, name) for r in history])
