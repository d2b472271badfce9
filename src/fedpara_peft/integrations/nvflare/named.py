"""Functions by name, as a job's JSON can hold them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from ...federation.errors import ArgumentsError

T = TypeVar("T")


def made_by(name: str, kind: type[T], config: Mapping[str, Any]) -> T:
    """What a function makes of the job's configuration.

    Args:
        name: ``"module:function"``.
        kind: what it must return.
        config: what it is given.

    Raises:
        ArgumentsError: there is no such function, or it returns something else.
    """
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentsError(
            f"{name!r} is no function that can be imported ({error}): name it as "
            "'module:function', and install the module on every site or ship it with the job"
        ) from error
    made = make(config)
    if not isinstance(made, kind):
        raise ArgumentsError(f"{name!r} returns a {type(made).__name__}, not a {kind.__name__}")
    return made
