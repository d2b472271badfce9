"""The package's types are there for those who install it (``py.typed``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedpara_peft

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parent.parent


def test_a_users_program_passes_mypy_strict(tmp_path):
    program = tmp_path / "program.py"  # from outside: no configuration of ours, no source folder
    program.write_text((ROOT / "tests" / "typed_user.py").read_text())
    settings = tmp_path / "mypy.ini"  # what is in transformers takes a minute to read
    settings.write_text("[mypy]\n[mypy-transformers.*]\nfollow_imports = skip\n")
    installed = Path(fedpara_peft.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", settings,
         "--cache-dir", ROOT / ".mypy_cache" / "user", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
