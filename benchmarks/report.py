"""Where and with what a table was measured, and writing it as JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState, is_initialized

import fedpara_peft

RESULTS = Path(__file__).parent / "results"


def ask_device(parser: argparse.ArgumentParser, compiles: bool = False) -> None:
    """Options of a benchmark that measures on either device, as it is or compiled."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    if compiles:
        parser.add_argument("--compile", action="store_true", help="models by torch.compile")


def environment(device: str | None = None) -> dict[str, Any]:
    """Machine, versions and command of this run; the GPU if it was measured (see :func:`write`)."""
    device = device or trained_on()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    # A folder of this machine means nothing on another: its name must do.
    arguments = [Path(a).name if "/" in a and Path(a).exists() else a for a in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    inside = script.is_relative_to(RESULTS.parent)
    name = script.relative_to(RESULTS.parent.parent) if inside else script.name
    return {
        "command": " ".join(["python", str(name), *arguments]),
        "cpu": f"{cpu} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "transformers")},
        "fedpara-peft": fedpara_peft.__version__,  # which may run from its sources
    }


def trained_on() -> str:
    """Where Accelerate put what this process trained; the CPU if it trained nothing."""
    return str(PartialState().device.type) if is_initialized() else "cpu"


def write(
    name: str,
    title: str,
    text: str,
    rows: list[dict[str, Any]],
    device: str | None = None,
    compiled: bool = False,
    command: str | None = None,
) -> None:
    """Write ``results/name.json`` and ``results/name.md`` and print the latter.

    Args:
        name: of the table; ``-cuda`` and ``-compile`` are added, so that tables stay apart, and
            where times were measured ``-avx2`` and the like by a CPU without AVX-512.
        title: its heading.
        text: table and notes.
        rows: what the JSON holds.
        device: where times were measured; by default :func:`trained_on`.
        compiled: whether by ``torch.compile``.
        command: what was run; by default this process's own.
    """
    RESULTS.mkdir(exist_ok=True)
    capability = torch.backends.cpu.get_cpu_capability()
    if device == "cpu" and capability != "AVX512":
        name += f"-{capability.lower()}"
    device = device or trained_on()
    name += ("" if device == "cpu" else f"-{device}") + ("-compile" if compiled else "")
    where = environment(device)
    where["command"] = command or where["command"]
    if compiled and device == "cpu":
        text += "\n\nPeaks leave out what compiled code makes inside its kernels."
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    setting = ", ".join(f"{k} {v}" for k, v in where.items() if v is not None and k != "command")
    markdown = f"# {title}\n\n`{where['command']}`\n\n{setting}\n\n{text.strip()}\n"
    (RESULTS / f"{name}.md").write_text(markdown)
    print(markdown)


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """Make a Markdown table; numbers, in all columns but the first, are aligned right."""
    lines = [header, ["---"] + ["---:" if numbers else "---"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
