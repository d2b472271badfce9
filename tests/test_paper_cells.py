"""The measurements of the paper's claims: interrupted runs go on, rates are tuned once."""

from dataclasses import replace
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "paper"


@pytest.fixture
def cells(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import cells

    return cells


def trainer(trained, fails_after=None):
    """Pretends to train; the best rate is 0.1."""

    def train(cell):
        if fails_after is not None and len(trained) == fails_after:
            raise KeyboardInterrupt
        trained.append(cell)
        return {"accuracy": 1 - abs(cell.learning_rate - 0.1), "seconds": 1.0}

    return train


def test_an_interrupted_run_goes_on_with_the_first_missing_cell(cells, tmp_path):
    wanted = [cells.Cell("cifar10", "cpu", "fedpara", seed=seed) for seed in (0, 1)]
    grid = wanted[0].of.grid
    trained = []
    with pytest.raises(KeyboardInterrupt):
        cells.Results(tmp_path).train(wanted, trainer(trained, fails_after=len(grid) + 1))
    assert [c.learning_rate for c in trained] == [*grid, 0.1]
    assert {c.seed for c in trained[:-1]} == {cells.TUNING_SEED}
    cells.Results(tmp_path).train(wanted, trainer(trained))
    assert [c.seed for c in trained[len(grid) :]] == [0, 1]
    results = cells.Results(tmp_path)
    assert results.get(wanted[1])["accuracy"] == 1
    assert results.get(replace(wanted[0], method="dense")) is None


def test_tables_that_share_a_cell_train_it_once(cells, tmp_path):
    cell = cells.Cell("mnist", "cpu", "fedavg", split="classes")
    trained = []
    results = cells.Results(tmp_path)
    results.train([cell], trainer(trained))
    results.train([cell, replace(cell, gamma=0.2)], trainer(trained))
    keys = [c.key() for c in trained]
    assert len(set(keys)) == len(keys) == 2 + len(cell.of.grid)
