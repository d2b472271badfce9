"""Notebooks: run in a kernel, reduced to what must not change from one machine to the next."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
#: What a notebook shows of an object, the richest first.
SHOWN = ("text/html", "image/png", "text/plain")
_NUMBER = re.compile(r"-?\d[\d,.]*(?:e[-+]\d+)?")


def read(path: Path) -> NotebookNode:
    """A notebook, of format 4."""
    return nbformat.read(path, as_version=4)


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook's cells run in order, in a new kernel that works in a folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message has its traceback.
    """
    notebook = read(path)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
    )
    # What dependencies will change; ours are errors in the other tests.
    quiet = "ignore::FutureWarning,ignore::DeprecationWarning"
    client.execute(env={**os.environ, "PYTHONWARNINGS": quiet, "HF_HUB_OFFLINE": "1"})
    return tidied(notebook)


def tidied(notebook: NotebookNode) -> NotebookNode:
    """Without what differs from run to run: times, numbers of outputs, what imports complain of."""
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        imports = cell is next(c for c in notebook.cells if c.cell_type == "code")
        cell.outputs = [
            output for output in cell.outputs if not (imports and output.get("name") == "stderr")
        ]
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = None
            if "data" in output:
                richest = next(kind for kind in SHOWN if kind in output.data)
                output.data = NotebookNode({richest: output.data[richest]})
                output.metadata = NotebookNode()
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """What was printed one after the other is one text, however it came in."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and "name" in output and output.name == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def shape(notebook: NotebookNode) -> list[list[str]]:
    """Each code cell's outputs: text without its numbers, tables as heads and first columns."""
    return [
        [_shape(output) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _shape(output: NotebookNode) -> str:
    if output.output_type == "stream":
        return f"{output.name}: {_without_numbers(output.text)}"
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    (kind,) = output.data
    if kind == "text/html":
        return f"{kind}: {tables(output.data[kind])}"
    return f"{kind}: {'' if kind == 'image/png' else _without_numbers(output.data[kind])}"


def _without_numbers(text: str) -> str:
    return re.sub(r" +", " ", _NUMBER.sub("#", text)).strip()


def tables(html: str) -> list[list[str]]:
    """Of each table the head, then the first cell of every row."""
    parser = _Tables()
    parser.feed(html)
    return [
        [*(cell for row in table if row and row[0][0] == "th" for _, cell in row)]
        + [row[0][1] for row in table if row and row[0][0] == "td"]
        for table in parser.tables
    ]


class _Tables(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, str]]]] = []
        self._cell: str | None = None

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append((tag, ""))
            self._cell = tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            tag, text = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (tag, text + data)
