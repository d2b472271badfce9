"""Processes that were given different things: one model, or one typed error, never a hang."""

import json

import pytest
import torch
from tests.federation.test_processes import run

from fedpara_peft.federation.data.fingerprint import tensor_digest


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


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.uint8, torch.bool],
)
def test_a_large_tensors_digest_is_of_all_its_entries_in_any_order_of_summing(dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(40_000) * 100).to(dtype).view(200, 200)
    threads = torch.get_num_threads()
    digests = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        digests.add(tensor_digest(tensor))
    torch.set_num_threads(threads)
    assert digests == {tensor_digest(tensor.T.contiguous().T)}
    other = tensor.clone()
    other[100, 100] = ~other[100, 100] if dtype == torch.bool else other[100, 100] + 1
    assert tensor_digest(other) not in digests


def test_the_digest_of_what_has_no_entries_of_its_own():
    one, other = (torch.empty(3, n, device="meta") for n in (4, 5))
    assert tensor_digest(one) == tensor_digest(torch.empty(3, 4, device="meta"))
    assert tensor_digest(one) != tensor_digest(other)
