"""Numbers in README and docs are those of the committed results that they name."""

import json
import re

import pytest
from tests.reported import MARK, NUMBER, ROOT, Reported, reported_in

README, MEASURED = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
PAGES = [README, MEASURED, *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_number_that_names_its_result_is_the_results(page):
    wrong = [found for found in reported_in(page.read_text()) if not found.agrees]
    assert not wrong, [f"{f.shown} is {f.result:g}: {f.source}" for f in wrong]


@pytest.mark.parametrize("page", [README, MEASURED], ids=lambda page: page.name)
def test_a_row_of_measured_numbers_names_its_result(page):
    lines = page.read_text().splitlines()
    heads = {i - 1 for i, line in enumerate(lines) if line.startswith("|--")}
    rows = [n for i, n in enumerate(lines) if n.startswith("| ") and i not in heads]
    silent = [row for row in rows if numbers_of(row.split("|")[2:]) and not MARK.search(row)]
    assert not silent


def numbers_of(cells):
    """Numbers that are neither code nor the address of a link."""
    shown = (re.sub(r"`[^`]*`|\]\([^)]*\)", "", cell) for cell in cells)
    return [number for cell in shown for number in NUMBER.findall(cell)]


@pytest.mark.parametrize(("page", "at_least"), [(README, 10), (MEASURED, 60)])
def test_the_pages_of_results_name_results(page, at_least):
    assert len(reported_in(page.read_text())) >= at_least


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"way": "ours, r = 4", "n": 3, "time of": 0.795, "acc": 0.5},
        {"way": "theirs", "n": 12345, "time of": 1.25, "acc": 0.25},
        {"way": "theirs", "n": 12345, "time of": 1.75, "acc": 0.75},
    ]
    (tmp_path / "speed.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = "| way | acc, % |\n| --- | ---: |\n| a, b | 1.0 |\n\nAnd\n\n"
    page += (
        "| way | n | acc, % | times |\n| --- | --- | --- | --- |\n| a, b | 1 | 5.0 ± 0.3 | 7 |\n"
    )
    (tmp_path / "page.md").write_text(page)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "numbers"),
    [
        ("0.80 of it<!-- of speed.json :: way=ours, r = 4 :: time of -->", [("0.80", 0.795)]),
        ("of 7, 12,345 <!-- of speed.json :: way=theirs & n=12345 :: n -->", [("12,345", 12345)]),
        (
            "| a | 50.0 ± 35.4 <!-- of lines.jsonl :: way=theirs :: 100 × mean acc;\n"
            "100 × std acc --> |",
            [("50.0", 50.0), ("35.4", 35.355)],
        ),
        (
            "5.0 ± 0.3, 7<!-- of page.md :: way=a, b & n=1 :: acc, %; times -->",
            [("5.0", 5.0), ("0.3", 0.3), ("7", 7.0)],
        ),
        ("all 3<!-- of speed.json :: :: count way -->", [("3", 3)]),
    ],
)
def test_a_mark_is_of_the_numbers_before_it(folder, page, numbers):
    found = reported_in(page, folder)
    assert [(f.shown, pytest.approx(f.result, abs=1e-3)) for f in found] == numbers
    assert all(f.agrees for f in found)
    assert not any(Reported(f.shown, 1.02 * f.result + 1, "").agrees for f in found)


@pytest.mark.parametrize(
    "page",
    [
        "1<!-- of speed.json :: way=nobody's :: n -->",
        "1<!-- of speed.json :: way=theirs :: time of -->",
        "1<!-- of speed.json :: way=theirs :: mean acc; n -->",
    ],
    ids=["no row", "rows that differ", "too few numbers"],
)
def test_a_mark_that_says_nothing_is_an_error(folder, page):
    with pytest.raises(AssertionError):
        reported_in(page, folder)
