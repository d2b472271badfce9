"""Whether an argument's value is one: its type, its interval, its options as text."""

from __future__ import annotations

import ast
import json
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import ArgumentsError


def as_annotated(args: Any, or_objects: Mapping[str, type]) -> None:
    """Make a dataclass's values of their annotated types where the same is meant; refuse the rest.

    A path is a string, one name is a list of it, and NumPy's numbers are Python's.

    Args:
        args: the dataclass's instance.
        or_objects: by name, what an argument may be beside its annotated type.
    """
    hints = typing.get_type_hints(type(args))
    for name in (entry.name for entry in fields(args)):
        kinds = typing.get_args(hints[name])
        optional = types.NoneType in kinds
        kind = next((k for k in kinds if k is not types.NoneType), hints[name])
        if not optional or typing.get_origin(hints[name]) is list:
            kind = hints[name]
        value = getattr(args, name)
        other = or_objects.get(name)
        if (value is None and optional) or (other is not None and isinstance(value, other)):
            continue
        ending = " or None" if optional else "" if other is None else f" or a {other.__name__}"
        setattr(args, name, _as_type(name, value, kind, ending))


def _as_type(name: str, value: Any, kind: Any, ending: str) -> Any:
    """A value of an argument as its annotation has it; else an error that ends so."""
    found = value
    if isinstance(value, numbers.Number) and not isinstance(value, bool):
        if kind is int and hasattr(value, "__index__"):
            found = operator.index(value)
        elif kind is float and isinstance(value, numbers.Real):
            found = float(value)
    elif kind is str and isinstance(value, os.PathLike):
        found = os.fspath(value)
    elif typing.get_origin(kind) is list and isinstance(value, str | list | tuple | set):
        found = [value] if isinstance(value, str) else list(value)
        if not all(isinstance(item, str) for item in found):
            found = None
    plain = typing.get_origin(kind) or kind
    if type(found) is not plain:
        shown = "a list of str" if plain is list else f"of type {plain.__name__}"
        raise ArgumentsError(
            f"{name} must be {shown}{ending}, got {value!r:.80} ({type(value).__name__})"
        )
    return found


def lies_in(value: float, interval: str) -> bool:
    """Whether a number lies in an interval, written as mathematicians do: ``(0, ∞)``."""
    low, high = interval[1:-1].split(", ")
    above = value >= float(low) if interval[0] == "[" else value > float(low)
    end = math.inf if high == "∞" else float(high)
    return above and (value <= end if interval[-1] == "]" else value < end)


def as_options(name: str, value: Any) -> Any:
    """Options by name, of a mapping or of text: JSON, or ``betas=(0.9, 0.95), eps=1e-6``.

    Raises:
        ArgumentsError: the text is neither, or the options cannot be written down as JSON, which
            checkpoints and nodes compare.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.lstrip().startswith("{") else _keywords(value)
        except (ValueError, SyntaxError) as error:
            raise ArgumentsError(
                f"{name}={value!r:.80} cannot be read ({error}): write 'name=value, name=value' or "
                "JSON"
            ) from None
    if isinstance(found, dict):
        try:
            json.dumps(found)
        except TypeError as error:
            raise ArgumentsError(
                f"{name} must hold numbers, texts and lists of them ({error}): for more give "
                "FederatedTrainer an optimizer"
            ) from None
    return found


def _keywords(text: str) -> dict[str, Any]:
    """``name=value, …`` as Python reads a call's; a bare word is text."""
    call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError("not of that form")
    return {
        str(k.arg): k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value)
        for k in call.keywords
    }
