"""Docstrings refer to code by Sphinx's roles; this turns them into plain code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")


class SphinxRoles(Extension):
    """Rewrites roles before a docstring is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for every object that was read."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(_plain, obj.docstring.value)


def _plain(found: re.Match[str]) -> str:
    return f"`{found[1].rpartition('.')[2]}`"
