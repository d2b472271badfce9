"""``fedpara``: the parser, and one line instead of a traceback for what a user can mend."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers.utils import logging

from ..maths.errors import FedParaError
from . import convert, inspect, merge, plan, report, watch

_COMMANDS = (plan, inspect, merge, convert, report, watch)

_EXAMPLES = """\
examples:
  fedpara plan ./my-model --gamma 0.1 --base-weight replaced --rounds 100 --clients 50
  fedpara inspect ./adapter
  fedpara merge ./adapter --base ./my-model --output ./merged
  fedpara convert --to lora ./adapter ./lora --base ./my-model
  fedpara report ./outputs/run
  fedpara watch ./outputs/run

A model or adapter is a local folder or an id on the Hub. Every command has its own --help.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="fedpara",
        description="FedPara: plan, look into, merge and convert adapters; report on and "
        "watch federated runs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0, or 2 where the command could not do what it was asked.
    """
    args = build_parser().parse_args(argv)
    try:
        with _quiet_dependencies():
            args.run(args)
    except (FedParaError, OSError) as error:  # OSError: no permission, no space
        print(f"fedpara: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _quiet_dependencies() -> Iterator[None]:
    """What dependencies warn of is for programmers; what matters here is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers|huggingface_hub)\b")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
