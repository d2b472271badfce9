"""Processes that were given different things: one model, or one typed error, never a hang."""

import json

import pytest
from tests.federation.test_processes import run


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    done = run(2, "agreement.py", folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"process-{i}.json").read_text()) for i in range(2)]


@pytest.mark.programs
@pytest.mark.parametrize("case", ["model", "frozen base", "transforms", "model again"])
def test_an_unseeded_script_trains_one_model(found, case):
    one, two = (process[case] for process in found)
    assert isinstance(one, list), one
    assert one == two


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("architecture", "the model's tensors: bias"),
        ("trainable", "the model's trainable parameters"),
        ("sizes", "clients' sizes"),
        ("rows", "clients' data"),
        ("names", "clients' names"),
        ("arguments", "learning_rate: 0.1 process 0, 0.2 process 1"),
        ("folder", "output_dir"),
        ("strategy", "strategy: ['FedAvg'"),
        ("eval", "eval_dataset"),
    ],
)
def test_what_differs_is_named_on_every_process(found, case, names):
    for process in found:
        assert process[case].startswith("AgreementError"), process[case]
        assert names in process[case]


@pytest.mark.parametrize(
    ("case", "who", "what"),
    [
        ("eval row", 1, "OSError: row 8 is gone"),
        ("client row", 1, "OSError: row 8 is gone"),
        ("callback", 0, "RuntimeError: the callback broke"),
    ],
)
def test_a_failure_on_one_process_ends_all(found, case, who, what):
    assert found[who][case] == what
    assert found[1 - who][case] == f"RoundError: process {who} stopped: {what}"
