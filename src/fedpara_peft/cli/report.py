"""``fedpara report``: a run's folder as one page, or several side by side."""

from __future__ import annotations

import argparse
from typing import Any

from ..integrations.comparison import write_comparison
from ..integrations.report import write_report
from .arguments import new_parser

_EXAMPLES = """\
examples:
  fedpara report ./outputs/run                      # writes ./outputs/run/report.html
  fedpara report ./outputs/run --output report.html --png ./figures
  fedpara report ./outputs/a ./outputs/b            # compares them in ./comparison.html

RUN_FOLDER is the trainer's output_dir. The page needs no other file and no network. Reports need
matplotlib: pip install 'fedpara-peft[report]'.
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(commands, "report", "write a page on a federated run", _EXAMPLES, run)
    parser.add_argument(
        "folders", metavar="RUN_FOLDER", nargs="+",
        help="output_dir of a FederatedTrainer; several are compared",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page (default: RUN_FOLDER/report.html, of several ./comparison.html)",
    )
    parser.add_argument("--png", metavar="DIR", help="write the figures as PNG, too")


def run(args: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    if len(args.folders) == 1:
        print(write_report(args.folders[0], args.output, args.png))
    else:
        print(write_comparison(args.folders, args.output or "comparison.html", args.png))
