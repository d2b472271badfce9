"""What a run costs the machine that it runs on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..state import Outcome

# Unix alone has it.
_resource: Any = (
    importlib.import_module("resource") if importlib.util.find_spec("resource") else None
)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that this process has held: of a CUDA device, else of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _resource is None:
        return None
    peak = int(_resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024  # others count in KiB


def work_of(sent: Sequence[Outcome]) -> tuple[int | None, float | None]:
    """Steps and terms of the clients that sent something; None where one did not tell."""
    steps = [outcome.steps for outcome in sent]
    terms = [outcome.terms for outcome in sent]
    return (
        None if None in steps else sum(s for s in steps if s is not None),
        None if None in terms else sum(t for t in terms if t is not None),
    )
