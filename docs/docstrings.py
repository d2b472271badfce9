"""What docstrings leave to others: Sphinx's roles, and the help texts of fields."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from griffe import Class, Extension, Module, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")


class Docstrings(Extension):
    """Completes docstrings before they are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Roles become plain code."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(_plain, obj.docstring.value)

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Fields that a command line explains by their metadata are explained here as well.

        Once all is loaded, for a dataclass may have fields of its bases, the last base's first.
        """
        for cls in _classes(pkg):
            order = [*reversed(cls.mro()), cls]
            texts = {
                name: _help(str(member.value))
                for base in order
                for name, member in base.attributes.items()
            }
            lines = [f"    {name}: {text}" for name, text in texts.items() if text]
            if cls.docstring and lines and "Args:" not in cls.docstring.value:
                head, raises, rest = cls.docstring.value.partition("Raises:")
                cls.docstring.value = "\n".join([head, "Args:", *lines, "", raises + rest])


def _classes(module: Module) -> Iterator[Class]:
    yield from (cls for cls in module.classes.values() if not cls.is_alias)
    for inner in module.modules.values():
        if not inner.is_alias:
            yield from _classes(inner)


def _plain(found: re.Match[str]) -> str:
    return f"`{found[1].rpartition('.')[2]}`"


def _help(value: str) -> str | None:
    """The ``help`` in ``field(metadata={"help": …})``."""
    try:
        call = ast.parse(value, mode="eval").body
    except SyntaxError:
        return None
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, text in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help":
                    return _text(text)
    return None


def _text(node: ast.expr) -> str:
    """A string; what it computes is shown as the expression."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return f"{{{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}}}"
