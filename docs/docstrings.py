"""What docstrings leave to others: Sphinx's roles, and the help texts of fields."""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Class, Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")


class Docstrings(Extension):
    """Completes docstrings before they are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Roles become plain code."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(_plain, obj.docstring.value)

    def on_class_members(self, *, cls: Class, **kwargs: Any) -> None:
        """Fields that a command line explains by their metadata are explained here as well."""
        texts = {name: _help(str(member.value)) for name, member in cls.attributes.items()}
        lines = [f"    {name}: {text}" for name, text in texts.items() if text]
        if cls.docstring and lines and "Args:" not in cls.docstring.value:
            head, raises, rest = cls.docstring.value.partition("Raises:")
            cls.docstring.value = "\n".join([head, "Args:", *lines, "", raises + rest])


def _plain(found: re.Match[str]) -> str:
    return f"`{found[1].rpartition('.')[2]}`"


def _help(value: str) -> str | None:
    """The ``help`` in ``field(metadata={"help": …})``."""
    try:
        call = ast.parse(value, mode="eval").body
    except SyntaxError:
        return None
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        if keyword.arg == "metadata":
            found: Any = ast.literal_eval(keyword.value)
            return str(found["help"])
    return None
