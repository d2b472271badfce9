"""An engine that is not installed is named, and what engines share needs none of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedpara_peft


def in_a_program(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.programs
@pytest.mark.parametrize(("package", "extra"), [("flwr", "flower"), ("nvflare", "nvflare")])
def test_a_missing_engine_is_named_with_its_extra(package, extra):
    code = f"import sys; sys.modules[{package!r}] = None\nimport fedpara_peft.integrations.{extra}"
    assert f"pip install 'fedpara-peft[{extra}]'" in in_a_program(code).stderr


def imported(path):
    """Top-level names of what a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_what_engines_share_knows_no_engine_and_no_file_one_system_alone():
    root = Path(fedpara_peft.__file__).parent / "integrations"
    shared = {name for path in (root / "engine").glob("*.py") for name in imported(path)}
    assert "accelerate" in shared
    assert not shared & {"flwr", "nvflare", "ray"}
    everywhere = {name for path in root.rglob("*.py") for name in imported(path)}
    assert {"flwr", "nvflare"} <= everywhere
    assert not everywhere & {"fcntl", "grp", "pwd", "resource", "termios"}  # Windows has none
