"""What several subcommands have in common: how a parser looks."""

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
