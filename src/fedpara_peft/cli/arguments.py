"""What several subcommands have in common: how a parser looks, and how numbers are written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def new_parser(
    commands: Any, name: str, help: str, examples: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """A subcommand's parser, with examples below its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def duration(seconds: float) -> str:
    """A time as a reader takes it in."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.3g} s"
