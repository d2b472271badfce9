"""Numbers in a page, read from the result they are of.

A comment names where the numbers just before it come from, as many as it has fields:

    0.80 of the loop's time (0.90)<!-- of federation_speed.json :: row=ours :: speed; mean other -->

    FILE :: CONDITION & CONDITION :: FIELD; FIELD

FILE lies in ``benchmarks/results``: JSON with ``rows``, JSON lines, or a page, of which the tables'
rows are taken. CONDITION is ``name=value``, of a row; none takes all rows. FIELD is ``[factor ×]
[mean|std|min|max|median|sum|count] name``; without a function all the rows must agree, and a page's
cell gives all of its numbers. The result, rounded as the page shows it, must be the page's number.
"""

import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"<!-- of (.*?) -->", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w.]*\d)")
FUNCTIONS = {
    "mean": statistics.mean,
    "std": statistics.stdev,
    "median": statistics.median,
    "min": min,
    "max": max,
    "sum": sum,
    "count": len,
}


class Reported(NamedTuple):
    """A number in a page, and what its result says."""

    shown: str
    result: float
    source: str

    @property
    def agrees(self):
        decimals = len(self.shown.partition(".")[2])
        return f"{self.result:.{decimals}f}" == self.shown.replace(",", "")


def reported_in(text, folder=RESULTS):
    """Every number of a page that names its source."""
    found, start = [], 0
    for mark in MARK.finditer(text):
        source = " ".join(mark[1].split())
        name, conditions, fields = (part.strip() for part in source.split("::"))
        rows = [row for row in rows_of(folder / name) if fits(row, conditions)]
        assert rows, f"no row of {name} has {conditions}"
        wanted = [value for field in fields.split(";") for value in values_of(field.strip(), rows)]
        numbers = NUMBER.findall(text[start : mark.start()])[-len(wanted) :]
        assert len(numbers) == len(wanted), f"{source}: fewer numbers before it than fields"
        found += [Reported(*pair, source) for pair in zip(numbers, wanted, strict=True)]
        start = mark.end()
    return found


def rows_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".md":
        return list(table_rows(path.read_text()))
    return json.loads(path.read_text())["rows"]


def table_rows(page):
    """Rows of a page's tables, by the tables' headers."""
    header = None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            header = None
        elif header is None:
            header = cells
        elif not set(line) <= set("|-: "):
            yield dict(zip(header, cells, strict=True))


def fits(row, conditions):
    pairs = [condition.split("=", 1) for condition in conditions.split("&") if condition.strip()]
    return all(name.strip() in row and text(row[name.strip()]) == v.strip() for name, v in pairs)


def text(value):
    return value if isinstance(value, str) else json.dumps(value)


def values_of(field, rows):
    factor, _, rest = field.rpartition("×")
    function, _, name = rest.strip().partition(" ")
    if function not in FUNCTIONS:
        function, name = None, rest.strip()
    values = [row[name] for row in rows]
    if function is not None:
        found = [FUNCTIONS[function](values)]
    else:
        assert len({text(v) for v in values}) == 1, f"{field}: the rows do not agree: {values}"
        of_page = isinstance(values[0], str)
        found = NUMBER.findall(values[0].replace(",", "")) if of_page else values[:1]
    return [float(factor or 1) * float(value) for value in found]
