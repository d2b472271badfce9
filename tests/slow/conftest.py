"""Tests that take minutes, and the tables of what they find.

    pytest -m slow tests/slow [--write-tables]

A test adds a row to its module's table; with ``--write-tables`` and all rows there it is written
into ``benchmarks/results``.
"""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """What forks has one thread, and holds no GPU."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(request):
    """Rows of the module's table, which its ``TABLE`` makes."""
    found = []
    yield found
    module = request.module
    if not request.config.getoption("--write-tables"):
        return
    asked = sum(item.path == request.node.path for item in request.session.items)
    if len(found) != asked or request.session.testsfailed:
        pytest.fail(f"{len(found)} of {asked} rows are there, or a test failed: nothing is written")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from report import write

    name, title, text_of = module.TABLE
    file = request.node.path.relative_to(ROOT)
    write(name, title, text_of(found), found, command=f"pytest -m slow {file} --write-tables")
