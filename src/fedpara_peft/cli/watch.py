"""``fedpara watch``: a run's rounds as they come."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from ..integrations.live import watch
from .arguments import new_parser

_EXAMPLES = """\
examples:
  fedpara watch ./outputs/run                       # until all of its rounds are there, or Ctrl-C
  fedpara watch ./outputs/run --every 10

The folder is all that is read, so the run may be a simulation, a federation of real machines, or
one on another computer whose folder is mounted here; and it may begin later.
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(commands, "watch", "follow a federated run", _EXAMPLES, run)
    parser.add_argument("folder", metavar="RUN_FOLDER", help="output_dir of a FederatedTrainer")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=2.0, help="how often to look (default: 2)"
    )


def run(args: argparse.Namespace) -> None:
    """Follow the run."""
    with contextlib.suppress(KeyboardInterrupt):
        watch(args.folder, sys.stdout, args.every)
