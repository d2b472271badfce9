"""The file of rows, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

NAME = "rows.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows; a last line without an end is of a part that was ended while it wrote."""
    file = folder / NAME
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(folder: Path, row: dict[str, Any]) -> None:
    """Write a row down at once."""
    with (folder / NAME).open("a") as file:
        file.write(json.dumps(row) + "\n")


def forget(folder: Path, parts: Collection[str]) -> None:
    """Drop the rows that these parts will measure anew."""
    kept = [row for row in read(folder) if row["part"] not in parts]
    (folder / NAME).write_text("".join(json.dumps(row) + "\n" for row in kept))


def merge(other: Path, folder: Path) -> None:
    """Take over another run's rows; a part's rows replace those that are here."""
    found = read(other)
    forget(folder, {row["part"] for row in found})
    for row in found:
        append(folder, row)
