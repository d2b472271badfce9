"""Whether a configuration's value is one, and the same value as Python's own type."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Real
from typing import Any, SupportsIndex

from ..errors import ConfigError


def integer(name: str, value: object) -> int:
    """An integer of any library; a bool, a text or a float is none."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or _is_array(value):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    return operator.index(value)


def real(name: str, value: object) -> float:
    """A finite number of any library."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    return value if isinstance(value, int | float) else float(value)


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and value.shape != ()


def is_one_of(value: object, choices: Iterable[object]) -> bool:
    """Whether a value is a choice itself, or the same text."""
    return any(
        value is choice or (isinstance(value, str) and value == choice) for choice in choices
    )


def names_of(name: str, value: Any, kind: type[set[str]] | type[list[str]]) -> Any:
    """Names as a collection of one kind; a text (a name, a regex, a shorthand) and None as is."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Collection) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{name} must be names or a text, got {value!r}")
    return kind(value)


def pattern_of(name: str, value: Any, number: Callable[[str, object], Any]) -> dict[str, Any]:
    """Numbers by layer name or regex; None is no entry."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must map layer names or regexes to numbers, got {value!r}")
    for pattern in value:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"{name} has {pattern!r}, which is neither a name nor a regex ({error})"
            ) from None
    return {p: number(f"{name}[{p!r}]", v) for p, v in value.items()}
