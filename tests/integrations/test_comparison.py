"""Several runs on one page."""

import pytest
from tests.integrations.test_report import figures, markers, report, save

from fedpara_peft.cli import main
from fedpara_peft.integrations.comparison import write_comparison
from fedpara_peft.integrations.run_folder import ReportError


def runs(tmp_path):
    common = {"clients": 3, "arguments": {"num_rounds": 6, "learning_rate": 0.1, "seed": 0}}
    for name in ("one/run", "two/run", "other"):
        (tmp_path / name).mkdir(parents=True)
    first = save(tmp_path / "one" / "run", *map(report, range(1, 7)), **common)
    changed = {**common, "arguments": {**common["arguments"], "learning_rate": 0.3}}
    second = save(tmp_path / "two" / "run", *map(report, range(1, 4)), **changed)
    return first, second


def test_two_runs_are_told_apart_and_compared(tmp_path, capsys):
    first, second = runs(tmp_path)
    page = tmp_path / "page.html"
    assert main(["report", str(first), str(second), "--output", str(page), "--png",
                 str(tmp_path / "png")]) == 0  # fmt: skip
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "one/run" in text
    assert "two/run" in text
    drawn = figures(text)
    assert list(drawn) == [
        "Accuracy, global model, against rounds and against what was sent",
        "Accuracy, mean over clients, against rounds and against what was sent",
        "Loss, global model, against rounds and against what was sent",
    ]
    assert len(list((tmp_path / "png").glob("compared_*.png"))) == 3
    # Every evaluated round has its dot: 6 + 3, in two axes.
    assert sum(markers(drawn[next(iter(drawn))]).values()) >= 2 * (6 + 3)
    # By hand: 0.1 a round, 8 kB a round; the loss is best where it is least.
    assert "0.6 (0.6 after round 6, 48.00 kB)" in text
    assert "0.3333 (0.3333 after round 6, 48.00 kB)" in text
    assert "<td>learning_rate</td><td>0.1</td><td>0.3</td>" in text
    assert "<td>seed</td>" not in text


def test_equal_settings_are_said(tmp_path):
    first, _ = runs(tmp_path)
    other = save(tmp_path / "other", *map(report, range(1, 7)), clients=3,
                 arguments={"num_rounds": 6, "learning_rate": 0.1, "seed": 0})  # fmt: skip
    text = write_comparison([first, other], tmp_path / "page.html").read_text()
    assert "The runs have the same settings" in text


def test_a_run_given_twice_is_refused(tmp_path):
    first, _ = runs(tmp_path)
    with pytest.raises(ReportError, match="is given twice"):
        write_comparison([first, first], tmp_path / "page.html")
