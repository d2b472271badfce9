"""The demo and its second process, on fewer rounds."""

from pathlib import Path

import pytest
from tests.forks import run_script

pytestmark = pytest.mark.programs

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    return run_script(EXAMPLES / script, *arguments, timeout=600)


def test_demo_trains_saves_reloads_and_merges(tmp_path):
    few = "--num_rounds 6 --client_fraction 0.25 --num_local_epochs 2 --max_grad_norm 2"
    done = run("digits_demo.py", "--output_dir", tmp_path, *few.split(), "--target", "0.3")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    parameters = {row[1].strip(): int(row[2].replace(",", "")) for row in rows}
    assert parameters["low-rank"] == parameters["FedPara"] < 0.3 * parameters["dense"]
    assert (tmp_path / "accuracy_vs_megabytes.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = run("digits_reload.py", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "bit for bit" in again.stdout


def test_the_reload_check_can_fail(tmp_path):
    done = run("digits_demo.py", "--output_dir", tmp_path, "--num_rounds", "1")
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    data = bytearray(adapter.read_bytes())
    data[-3] ^= 0x40
    adapter.write_bytes(data)
    assert "differ" in run("digits_reload.py", tmp_path).stderr
