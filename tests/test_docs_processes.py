"""Two processes on the documented blocks, unseeded as they stand: one model or one error."""

import json
from pathlib import Path

import pytest
from tests.federation.test_processes import run

SCRIPT = Path(__file__).parent / "docs_in_processes.py"


@pytest.mark.slow
def test_every_block_ends_in_one_model_or_one_typed_error(tmp_path):
    done = run(2, SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"process-{i}.json").read_text()) for i in range(2))
    assert one.keys() == two.keys()
    trained = 0
    for block, models in one.items():
        if isinstance(models, list):
            assert models == two[block], block
            trained += len(models)
        else:
            assert models.startswith("AgreementError: the processes were given"), (block, models)
            assert two[block].startswith("AgreementError: the processes were given"), block
    assert trained >= 10
