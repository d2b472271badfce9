"""The parts by name, and running some of them in this process."""

from __future__ import annotations

import argparse
import importlib
import time
import warnings

import torch
from session import Session


def measure(options: argparse.Namespace) -> int:
    """Measure parts one after the other; 1 if anything of them failed."""
    torch.manual_seed(0)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: --device cpu --smoke tries every line without one")
    warnings.filterwarnings("ignore", ".*not part of single contiguous chunk.*", UserWarning)
    failures = 0
    end = time.monotonic() + options.seconds
    for index, name in enumerate(options.part):
        seconds = (end - time.monotonic()) / (len(options.part) - index)
        session = Session(name, options.device, options.smoke, options.out, seconds)
        try:
            importlib.import_module(f"part_{name}").measure(session, options)
        except Exception as error:
            session.fail(name, {}, error)
        failures += session.failures
    return int(failures > 0)
