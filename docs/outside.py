"""Pages of the site that lie outside of docs: the results with their tables, and the notebooks."""

from __future__ import annotations

import json
import posixpath
import re
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

#: Folders of the repository that keep their place on the site, and what of them is shown.
_SHOWN = ("benchmarks/RESULTS.md", "benchmarks/results/**/*.md", "benchmarks/results/**/*.png")
_NOTEBOOKS = "examples/notebooks/*.ipynb"
#: Pages that have every word are found after those that explain it, and tables not at all: the page
#: that speaks of a table is.
_SEARCH = {"api.md": 0.2, "benchmarks/RESULTS.md": 0.5}
_FENCE = re.compile(r"(^```.*?^```$)", re.S | re.M)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)\s#]+")
_NAME = re.compile(r"(?<!\[)`([\w./-]+\.(?:md|ipynb))`(?!\])")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Results and notebooks become files of the site."""
    root = Path(config.docs_dir).parent
    for path in sorted(found for pattern in _SHOWN for found in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".md":
            _add(files, config, name, path.read_text(encoding="utf-8"))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted(root.glob(_NOTEBOOKS)):
        name = path.relative_to(root).with_suffix(".md").as_posix()
        _add(files, config, name, notebook_page(path))


def _add(files: Files, config: MkDocsConfig, name: str, text: str) -> None:
    file = File.generated(config, name, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
    files.append(file)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What leads out of docs in the repository, or names a file of it, leads to its page here."""
    root = Path(config.docs_dir).parent
    uri = page.file.src_uri
    if uri.startswith("benchmarks/results/"):
        page.meta["search"] = {"exclude": True}
    elif uri in _SEARCH:
        page.meta["search"] = {"boost": _SEARCH[uri]}
    here = posixpath.dirname(uri if page.file.generated_by else f"docs/{uri}")

    def link(path: str) -> str | None:
        shown = re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
        if not (root / path).is_file() or files.get_file_from_path(shown) is None:
            return None
        return posixpath.relpath(shown, posixpath.dirname(uri) or ".")

    def linked(found: re.Match[str]) -> str:
        return link(posixpath.normpath(posixpath.join(here, found[0]))) or found[0]

    def named(found: re.Match[str]) -> str:
        places = (link(posixpath.join(folder, found[1])) for folder in ("benchmarks/results", ""))
        target = next(filter(None, places), None)
        return f"[{found[0]}]({target})" if target else found[0]

    parts = _FENCE.split(markdown)  # texts, and code between them
    parts[::2] = [_NAME.sub(named, _LINK.sub(linked, text)) for text in parts[::2]]
    return "".join(parts)


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its texts, its code, and what is committed as shown."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts += [_shown(output) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    if "text" in output:
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "text/html" in data:
        return "".join(data["text/html"])
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        title = escape("".join(data.get("text/plain", "")) or "What the cell draws")
        return f'<img class="drawn" alt="{title}" src="data:image/png;base64,{encoded}">'
    return f"```text\n{''.join(data['text/plain'])}\n```"
