"""Where and with what a table was measured, and writing it as JSON and Markdown."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Machine, versions and command of this run."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    # A folder of this machine means nothing on another: its name must do.
    arguments = [Path(a).name if "/" in a and Path(a).exists() else a for a in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    inside = script.is_relative_to(RESULTS.parent)
    name = script.relative_to(RESULTS.parent.parent) if inside else script.name
    return {
        "command": " ".join(["python", str(name), *arguments]),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "transformers", "fedpara-peft")},
    }


def write(name: str, title: str, text: str, rows: list[dict[str, Any]]) -> None:
    """Write ``results/name.json`` and ``results/name.md`` and print the latter."""
    RESULTS.mkdir(exist_ok=True)
    where = environment()
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    setting = ", ".join(f"{k} {v}" for k, v in where.items() if v is not None and k != "command")
    markdown = f"# {title}\n\n`{where['command']}`\n\n{setting}\n\n{text.strip()}\n"
    (RESULTS / f"{name}.md").write_text(markdown)
    print(markdown)


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """Make a Markdown table; numbers, in all columns but the first, are aligned right."""
    lines = [header, ["---"] + ["---:" if numbers else "---"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
