"""The parser as ``commands.json`` describes it, and the way on to the commands."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .completion import SHELLS, completion

_TYPES = {"int": int, "float": float}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands, which runs none of them."""
    described = json.loads(Path(__file__).with_name("commands.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(
        prog="fedpara",
        description=described["description"],
        epilog=described["epilog"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedpara-peft {_version()}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    for name, command in described["commands"].items():
        made = commands.add_parser(
            name,
            help=command["help"],
            description=command["description"],
            epilog=command["epilog"],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_arguments(made, command["arguments"])
    shell = commands.add_parser(
        "completion",
        help="print a shell's completion of this command",
        description="Print a shell's completion of this command.",
        epilog='examples:\n  eval "$(fedpara completion bash)"    # in ~/.bashrc; zsh: in ~/.zshrc'
        "\n  fedpara completion fish > ~/.config/fish/completions/fedpara.fish\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shell.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; help, version, completion and wrong arguments take no time.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0, or 2 where the command could not do what it was asked.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    asked = parser.parse_args(argv)
    if asked.command == "completion":
        print(completion(asked.shell, _words(parser)), end="")
        return 0
    status: int = importlib.import_module("fedpara_peft.cli").main(argv)
    return status


def _add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[Mapping[str, Any]]) -> None:
    groups: dict[int, Any] = {}
    for argument in arguments:
        options = dict(argument["options"])
        if "type" in options:
            options["type"] = _TYPES[options["type"]]
        group = argument.get("exclusive")
        if group is not None and group not in groups:
            groups[group] = parser.add_mutually_exclusive_group()
        target = parser if group is None else groups[group]
        target.add_argument(*argument["names"], **options)


def _words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """What may follow each command: its options, and values of a positional that has choices."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    words = {}
    for name, command in commands.choices.items():
        actions = command._actions
        found = [option for action in actions for option in action.option_strings]
        fixed = (a.choices for a in actions if not a.option_strings and a.choices)
        words[name] = [*found, *(choice for choices in fixed for choice in choices)]
    return words


def _version() -> str:
    return version("fedpara-peft")
