"""README and docs run, parse and point as written, and quote messages that exist."""

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

import fedpara_peft
from fedpara_cli import build_parser
from fedpara_peft.comm.errors import Refusal

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
#: No code to run, but links to follow.
OTHERS = [ROOT / name for name in ("benchmarks/RESULTS.md", "CONTRIBUTING.md", "SECURITY.md")]
ERRORS = (ROOT / "docs" / "errors.md").read_text()
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
#: Pages whose code needs an extra that the plain suite does not have; `make test-engines` has it.
_NEEDS = {"nvflare": "nvflare"}
_LANGUAGES = {"python", "sh", "text", "toml", ""}  # only Python is run


def blocks(page, *languages):
    """Blocks of these languages, each moved down to the line where the page has it."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        assert found[1] in _LANGUAGES, f"{page.name}: what is a {found[1]} block?"
        if found[1] in languages:
            yield "\n" * text[: found.start(2)].count("\n") + found[2]


def outputs(page):
    """What a page says that a Python block prints: a text block right after it."""
    text = page.read_text()
    fences = list(_FENCE.finditer(text))
    for code, shown in itertools.pairwise(fences):
        adjacent = not text[code.end() : shown.start()].strip()
        if (code[1], shown[1], adjacent) == ("python", "text", True):
            yield shown[2]


@pytest.mark.programs
@pytest.mark.filterwarnings("ignore:.*will be removed in Click")  # flwr's, at its first import
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    """A page's blocks in reading order; each of the README's alone, for people copy those."""
    if page.stem in _NEEDS:
        pytest.importorskip(_NEEDS[page.stem], reason="run by `make test-engines`")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    for block in blocks(page, "python"):
        if page == README:
            if block == first_result():
                continue  # runs below, in a process of its own
            names = {"__name__": "docs"}
        exec(compile(block, str(page), "exec"), names)
    said = capsys.readouterr().out
    for shown in outputs(page):
        assert shown in said


def first_result():
    """The README's block that ends in an accuracy."""
    (block,) = (block for block in blocks(README, "python") if "eval_accuracy" in block)
    return block


@pytest.mark.programs
def test_the_readmes_federation_runs_in_a_new_process_and_learns(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", first_result()],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+)% after", done.stdout).group(1)) > 80


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_the_options_they_are_given(page):
    for block in blocks(page, "sh", ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fedpara"] and "--help" not in words:
                build_parser().parse_args(words[1:])


def test_the_readme_is_read_in_minutes():
    """700 words, code included; comments are not shown."""
    assert len(re.sub("<!--.*?-->", "", README.read_text(), flags=re.S).split()) <= 700


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_the_repository_that_are_named_exist(page):
    for path in re.findall(r"`((?:examples|benchmarks)/[\w/.]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_public_name_is_in_the_reference_once():
    text = (ROOT / "docs" / "api.md").read_text()
    shown = re.findall(r"^::: fedpara_peft\.(\w+)$", text, re.M)
    assert sorted(shown) == sorted(fedpara_peft.__all__)


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {page.name for page in PAGES if page != README}


def test_the_landing_pages_picture_is_the_results():
    shown = ROOT / "docs" / "pictures" / "accuracy-for-bytes.png"  # a site has only what is in docs
    result = ROOT / "benchmarks" / "results" / "paper" / "cpu-shakespeare-figure3.png"
    assert shown.read_bytes() == result.read_bytes()


def test_there_is_one_version():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert cited[1] == packaged == fedpara_peft.__version__


# When it fails.


def templates():
    """All texts in the source, with … for what is filled in."""
    for path in Path(fedpara_peft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                yield "".join(parts)


def quoted():
    """The messages of the tables' first column."""
    for line in ERRORS.splitlines():
        if line.startswith("| `") and "(PEFT's)" not in line:
            cell = line[2:].split(" | ")[0]
            for long, short in re.findall(r"``` (.*?) ```|`([^`]+)`", cell):
                yield long or short


def test_quoted_messages_are_the_sources():
    found = "\n".join(templates())
    known = {*fedpara_peft.__all__, *get_args(Refusal)}
    stale = []
    for message in quoted():
        pattern = ".*".join(re.escape(part) for part in message.strip("…").split("…"))
        if message not in known and not re.search(pattern, found):
            stale.append(message)
    assert not stale


def test_every_error_and_every_reason_is_explained():
    for name in fedpara_peft.__all__:
        if name.endswith("Error"):
            assert f"`{name}`" in ERRORS, name
    for reason in get_args(Refusal):
        assert f"`{reason}`" in ERRORS, reason
