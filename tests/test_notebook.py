"""What a notebook shows of a summary, a plan, a history and a trainer."""

import dataclasses
import xml.etree.ElementTree as ET

from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp

from fedpara_peft import (
    FederatedTrainer,
    History,
    accuracy,
    fedpara_summary,
    partition,
    plan,
)
from fedpara_peft.comm.ledger import shown_bytes


def table(thing):
    """Its rows, of markup that is well-formed."""
    page = ET.fromstring(f"<div>{thing._repr_html_()}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]


def test_a_summary_shows_what_it_prints():
    summary = fedpara_summary(adapted(mlp(), gamma=0.4))
    printed = [line.split() for line in str(summary).splitlines()]
    shown = [" ".join(row).split() for row in table(summary)]
    assert shown == printed
    assert len(shown) == len(summary.rows) + 2


def test_a_plan(tmp_path):
    planned = plan(adapted(mlp()), arguments(tmp_path, num_rounds=3), 4)
    rows = dict(table(planned))
    assert f"{planned.num_values:,} values are communicated" in rows["values"]
    assert shown_bytes(planned.total_bytes) == rows["all together"]
    shown = {rows[f"transfers at {n} Mbit/s"] for n in (2, 10, 50)}  # a short run's are not all 0 s
    assert len(shown) == 3
    assert f"{planned.total_s(50):.3g} s, computing left out" in shown


def test_a_history_and_a_trainer(tmp_path):
    args = arguments(tmp_path, num_rounds=2)
    clients = partition(toy(), "iid", 4)
    trainer = FederatedTrainer(adapted(mlp()), args, clients, toy(), compute_metrics=accuracy)
    assert table(trainer) == [["round", "train_loss", "sent"]]
    history = trainer.train()
    head, first, last = table(history)
    assert head[:2] == ["round", "train_loss"]
    assert "eval_accuracy" in head
    assert last[head.index("eval_accuracy")] == f"{history[-1].metrics['eval_accuracy']:.4g}"
    assert last[-1] == shown_bytes(history.total_bytes)
    assert first[1] == f"{history[0].train_loss:.4g}"
    assert table(trainer) == table(history)
    assert "FederatedTrainer of" in trainer._repr_html_()


def test_a_long_history_shows_its_end(tmp_path):
    args = arguments(tmp_path, num_rounds=1)
    one = FederatedTrainer(adapted(mlp()), args, partition(toy(), "iid", 4)).train()[0]
    history = History(tuple(dataclasses.replace(one, round=n) for n in range(1, 31)))
    rows = table(history)
    assert [row[0] for row in rows] == ["round", *map(str, range(11, 31))]
    assert rows[-1][-1] == shown_bytes(history.total_bytes)
    assert "10 earlier rounds are not shown" in history._repr_html_()


def test_names_cannot_carry_markup():
    summary = fedpara_summary(adapted(mlp()))
    row = dataclasses.replace(summary.rows[0], name="<script>")
    assert "&lt;script&gt;" in dataclasses.replace(summary, rows=(row,))._repr_html_()
