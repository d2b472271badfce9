"""The notebooks run in a kernel, and show what is committed; --write-tables commits anew."""

import re

import nbformat
import pytest
from tests.notebooks import NOTEBOOKS, executed, read, shape

#: What only the machine that ran a notebook has: a path, an object's place in memory.
_MACHINE = re.compile(r"/(?:home|root|tmp|work|usr|Users)/|site-packages| at 0x[0-9a-f]+")


@pytest.mark.programs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_committed(path, tmp_path, request):
    now = executed(path, tmp_path)
    if request.config.getoption("--write-tables"):
        path.write_text(nbformat.writes(now, indent=1) + "\n")
    assert shape(now) == shape(read(path)), "pytest tests/test_notebook_gallery.py --write-tables"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_small_and_of_no_machine(path):
    text, notebook = path.read_text(), read(path)
    assert path.stat().st_size < 100_000
    assert not _MACHINE.search(re.sub(r'"image/png": "[^"]*"', "", text))
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert {o.get("name", "stdout") for o in outputs} == {"stdout"}
    assert not [o for o in outputs if o.output_type == "error"]


def test_both_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} == {"finetune", "personalize"}


def test_the_objects_of_the_package_are_shown_as_tables():
    """Summary, plan, history and trainer, each the last line of a cell."""
    shown = {
        cell.source.splitlines()[-1].partition("(")[0]: kinds(cell)
        for path in NOTEBOOKS
        for cell in read(path).cells
        if cell.cell_type == "code"
    }
    for last in ("fedpara_summary", "plan", "history", "pfedpara"):
        assert shown[last] == ["text/html"], last


def kinds(cell):
    return [kind for output in cell.outputs for kind in output.get("data", {})]


def test_a_column_that_is_gone_is_seen():
    path = next(path for path in NOTEBOOKS if path.stem == "personalize")
    changed = read(path)
    (history,) = next(cell for cell in changed.cells if cell.source.endswith("history")).outputs
    history.data["text/html"] = history.data["text/html"].replace("train_loss", "loss")
    assert shape(changed) != shape(read(path))
    numbers = read(path)
    for cell in numbers.cells:
        for output in cell.get("outputs", ()):
            if "text" in output:
                output.text = output.text.replace("9", "8")
    assert shape(numbers) == shape(read(path))  # another machine's last digit is no difference
