"""Write ``commands.json``: what the commands take, read from their parsers.

python -m fedpara_cli.describe
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedpara_peft.cli.main import build_parser

_KEPT = ("nargs", "default", "choices", "metavar", "help")


def described() -> dict[str, Any]:
    """The parsers' description, for JSON."""
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {action.dest: action.help for action in commands._choices_actions}
    return {
        "description": parser.description,
        "epilog": parser.epilog,
        "commands": {
            name: {
                "help": helps[name],
                "description": command.description,
                "epilog": command.epilog,
                "arguments": _arguments(command),
            }
            for name, command in commands.choices.items()
        },
    }


def _arguments(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    exclusive = {
        id(action): number
        for number, group in enumerate(parser._mutually_exclusive_groups)
        for action in group._group_actions
    }
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        argument: dict[str, Any] = {
            "names": action.option_strings or [action.dest],
            "options": _options(action),
        }
        if id(action) in exclusive:
            argument["exclusive"] = exclusive[id(action)]
        found.append(argument)
    return found


def _options(action: argparse.Action) -> dict[str, Any]:
    if isinstance(action, argparse._StoreTrueAction):
        return {"action": "store_true", "help": action.help}
    options = {name: getattr(action, name) for name in _KEPT}
    options = {name: value for name, value in options.items() if value is not None}
    if action.option_strings and action.required:
        options["required"] = True
    if isinstance(action.type, type):
        options["type"] = action.type.__name__
    if "choices" in options:
        options["choices"] = list(options["choices"])
    return options


def main() -> None:
    """Write the file."""
    path = Path(__file__).with_name("commands.json")
    path.write_text(json.dumps(described(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
