"""``fedpara report``: a run's folder as one page."""

from __future__ import annotations

import argparse
from typing import Any

from ..integrations.report import write_report
from .arguments import new_parser

_EXAMPLES = """\
examples:
  fedpara report ./outputs/run                      # writes ./outputs/run/report.html
  fedpara report ./outputs/run --output report.html --png ./figures

RUN_FOLDER is the trainer's output_dir. The page needs no other file and no network. Reports need
matplotlib: pip install 'fedpara-peft[report]'.
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(commands, "report", "write a page on a federated run", _EXAMPLES, run)
    parser.add_argument("folder", metavar="RUN_FOLDER", help="output_dir of a FederatedTrainer")
    parser.add_argument(
        "--output", metavar="FILE", help="the page (default: RUN_FOLDER/report.html)"
    )
    parser.add_argument("--png", metavar="DIR", help="write the figures as PNG, too")


def run(args: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    print(write_report(args.folder, args.output, args.png))
