"""A self-contained HTML page: its head, its tables, its figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .figures import FigureOf, render, unit_of

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #000; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #bbb; padding: .2rem .9rem .2rem 0; text-align: left;
         vertical-align: top; }
td.n, th.n { text-align: right; } img { width: 100%; height: auto; }
.wide { overflow-x: auto; } .wide td:first-child { white-space: nowrap; }
.wide table { min-width: 40rem; } p.note { color: #444; margin: .2rem 0; }
@media (max-width: 40rem) { body { margin: 1rem auto; } .figure { overflow-x: auto; }
       .figure img { width: auto; min-width: 40rem; } td:not(.wide *) { overflow-wrap: anywhere; } }
@media screen and (prefers-color-scheme: dark) { body { color: #ddd; background: #000; }
       img { filter: invert(1); } p.note { color: #aaa; } th, td { border-color: #555; } }
@media print { details { display: none; } h2 { break-after: avoid; } }
"""


def page_of(title: str, parts: Iterable[str]) -> str:
    """The page of these parts, each HTML; empty ones are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def figure_part(figure: FigureOf) -> str:
    """A figure with its title, drawn into the page."""
    image = io.BytesIO()
    render(figure, image, "svg")
    data = base64.b64encode(image.getvalue()).decode()
    title = escape(figure.title)
    return (
        f'<h2>{title}</h2>\n<div class="figure">'
        f'<img alt="{title}" src="data:image/svg+xml;base64,{data}"></div>'
    )


def table_of(
    rows: Iterable[Sequence[Any]], head: Sequence[str] = (), numbers_from: int | None = None
) -> str:
    """A table; all text is escaped. Columns from ``numbers_from`` on are set right."""

    def cells(row: Sequence[Any], tag: str) -> str:
        classes = [' class="n"' if numbers_from is not None else "" for _ in row]
        made = (f"<{tag}{c}>{escape(str(v))}</{tag}>" for v, c in zip(row, classes, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    lines = [cells(head, "th")] if head else []
    lines += [cells(row, "td") for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def shown_size(num_bytes: float) -> str:
    """Bytes as a reader sees them."""
    unit, size = unit_of(num_bytes)
    return f"{num_bytes / size:,.2f} {unit}"


def text_of(value: Any) -> str:
    """A setting's value as a reader sees it."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
