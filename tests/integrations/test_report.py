"""Reports of runs with everything in them, and of runs with next to nothing."""

import base64
import dataclasses
import json
import re
import sys
import xml.etree.ElementTree as ET

import pytest
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp

from fedpara_peft import FederatedTrainer, History, accuracy, partition
from fedpara_peft.cli import main
from fedpara_peft.federation.state import RoundReport
from fedpara_peft.integrations.report import write_report
from fedpara_peft.integrations.run_folder import ReportError, load_run

PLAIN = RoundReport(1, (0, 1), None, {}, 3_000, 5_000, 100, 0.5)


def report(number, **changes):
    scores = {
        "eval_accuracy": 0.1 * number,
        "eval_loss": 2 / number,
        "client_accuracy_mean": 0.09 * number,
        "client_accuracy_worst_decile": 0.01,
    }
    full = {
        "round": number,
        "train_loss": 1 / number,
        "metrics": scores,
        "refused": ((1, "norm"),) if number == 2 else (),
        "dropped": (0,) if number == 3 else (),
        "client_metrics": {"accuracy": {"ann": 0.1, 7: 0.2, "bob": 0.01 * number}},
        "averaging_bias": 0.02,
        "epsilon": 0.5 * number,
    }
    return dataclasses.replace(PLAIN, **{**full, **changes})


def save(folder, *reports, **settings):
    History(tuple(reports)).save(folder / "history.json")
    if settings:
        (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def figures(page):
    """The figures by their title; every one is well-formed."""
    found = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)">', page)
    return {title: ET.fromstring(base64.b64decode(data)) for title, data in found}


def test_a_full_run(tmp_path):
    folder = save(tmp_path, *map(report, range(1, 7)), clients=3, versions={"torch": "2.9"})
    page = write_report(folder, png_folder=tmp_path / "png").read_text()
    assert list(figures(page)) == [
        "Quality against rounds and against what was sent",
        "Loss",
        "Clients&#x27; own accuracy",
        "Bytes a round",
        "Clients that did not report or were refused",
        "Error of averaging factors instead of weights",
        "Privacy spent",
    ]
    assert len(list((tmp_path / "png").glob("*.png"))) == 7
    assert "0.6 after round 6; highest 0.6 after round 6" in page
    assert "48.00 kB: 18.00 kB up, 30.00 kB down; 1.2% of it headers" in page
    assert "1 did not report, 1 were refused" in page
    assert re.search(r"<td>norm</td><td>1</td><td>1</td>", page)
    assert "ε = 3" in page
    assert "2.9" in page


def markers(image):
    """How often each shape is drawn, in the order of the drawing."""
    uses = [node.get("{http://www.w3.org/1999/xlink}href") for node in image.iter()]
    found = [use[1:] for use in uses if use and use.startswith("#m")]
    return {name: found.count(name) for name in found}


def test_every_evaluated_round_has_its_dot(tmp_path):
    """Evaluated in every second of sixty rounds: thirty dots, for rounds and for bytes each."""
    scores = [{"eval_accuracy": n / 60} if n % 2 == 0 else {} for n in range(1, 61)]
    bare = {"client_metrics": {}, "averaging_bias": None, "epsilon": None, "train_loss": None}
    rounds = (report(n, metrics=m, **bare) for n, m in enumerate(scores, 1))
    page = write_report(save(tmp_path, *rounds)).read_text()
    quality = figures(page)["Quality against rounds and against what was sent"]
    assert max(markers(quality).values()) == 30 + 30 + 1  # and one in the legend


def test_the_page_has_a_dark_half_and_fits_a_phone(tmp_path):
    page = write_report(save(tmp_path, report(1))).read_text()
    assert '<meta name="color-scheme" content="light dark">' in page
    assert "prefers-color-scheme: dark" in page
    assert page.count('<div class="figure">') == len(figures(page)) > 3


def test_a_page_needs_nothing_else_and_is_the_same_again(tmp_path):
    save(tmp_path, *map(report, range(1, 4)))
    page = write_report(tmp_path).read_text()
    assert page == write_report(tmp_path, tmp_path / "again/page.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert str(tmp_path) not in page


@pytest.mark.parametrize(
    "reports",
    [
        [PLAIN],
        [dataclasses.replace(PLAIN, uplink_bytes=0, downlink_bytes=0)],
        [dataclasses.replace(report(1), client_metrics={"loss": {0: 0.5}})],
        [report(n, metrics={"eval_f1": 0.2} if n % 50 == 0 else {}) for n in range(1, 401)],
    ],
    ids=["one round without numbers", "nothing sent", "one client", "many rounds"],
)
def test_sparse_runs(tmp_path, reports):
    assert figures(write_report(save(tmp_path, *reports)).read_text())


def test_names_are_escaped(tmp_path):
    folder = tmp_path / "<b>run"
    folder.mkdir()
    page = write_report(save(folder, PLAIN, strategy="<script>")).read_text()
    assert "<script>" not in page
    assert "<b>" not in page


def test_of_the_trainer(tmp_path, capsys):
    args = arguments(tmp_path, num_rounds=3, save_every=2, clients_per_round=2)
    clients = partition(toy(), "iid", 4)
    trainer = FederatedTrainer(
        adapted(mlp()), args, clients, toy(), compute_metrics=accuracy, client_eval_dataset=clients
    )
    history = trainer.train()
    run = load_run(tmp_path)
    assert run.history == history
    assert run.settings["num_rounds"] == 3
    assert run.settings["clients"] == 4
    assert run.settings["strategy"] == "FedAvg()"
    assert "output_dir" not in run.settings
    assert {"python", "torch", "peft"} <= run.versions.keys()
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "r.html")
    # Of a run that was interrupted, its newest checkpoint is what there is.
    (tmp_path / "history.json").unlink()
    (tmp_path / "settings.json").unlink()
    (tmp_path / "checkpoint-3").rename(tmp_path / "elsewhere")
    run = load_run(tmp_path)
    assert run.history.rounds == history.rounds[:2]
    assert run.source == "checkpoint-2/trainer_state.json"
    assert "4, 2 in the last round" in write_report(tmp_path).read_text()


def test_what_cannot_be_reported_on(tmp_path, capsys, monkeypatch):
    assert main(["report", str(tmp_path)]) == 2
    assert "neither history.json nor a checkpoint" in capsys.readouterr().err
    for text, says in (("[]", "no rounds"), ("{", "not JSON"), ('[{"round": 1}]', "version")):
        (tmp_path / "history.json").write_text(text)
        with pytest.raises(ReportError, match=says):
            write_report(tmp_path)
    save(tmp_path, PLAIN)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"fedpara-peft\[report\]"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
