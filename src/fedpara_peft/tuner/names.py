"""Names of modules: what the plain model calls them, and which pattern speaks of them.

Names are compared by whole dotted parts. What PEFT and wrappers put around a module is known by the
modules' types, so that a module of the user's may be called ``base_layer`` or ``fedpara_head``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ._peft import match_target_against_key
from .errors import ConfigError

Value = TypeVar("Value")

#: Wrappers that ``state_dict()`` leaves out of its keys: FSDP's and activation checkpointing's.
_NOT_IN_STATE_DICT = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPERS = _NOT_IN_STATE_DICT | {"_orig_mod"}  # torch.compile's is in the keys
#: A pattern without regex operators: what it matches is spelt out in it.
_SPELT_OUT = re.compile(r"\^?((?:[^\\^$*+?{}\[\]|()]|\\[^a-zA-Z0-9])*)\$?")
_ESCAPE = re.compile(r"\\(.)")


def base_names(model: nn.Module) -> dict[str, str]:
    """The names of all modules, and what the plain model calls them.

    Of a tuner layer and the layer that it wraps both have the plain layer's name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    plain = {"": ""}
    for name in modules:
        if not name:
            continue
        parent, _, part = name.rpartition(".")
        if _is_wrapped(modules[parent], part):
            plain[name] = plain[parent]
        else:
            plain[name] = f"{plain[parent]}.{part}" if plain[parent] else part
    return plain


def saved_name(name: str) -> str:
    """A name as ``state_dict()`` has it."""
    return ".".join(part for part in name.split(".") if part not in _NOT_IN_STATE_DICT)


def module_matches(name: str, patterns: Collection[str] | str) -> bool:
    """PEFT's matching of names: a regex, or the end of the module's dotted name."""
    if isinstance(patterns, str):
        return bool(match_target_against_key(patterns, name))
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def exact_pattern(name: str) -> str:
    """A pattern that matches this full name and no other, by our rule and by PEFT's."""
    return f"^{re.escape(name)}"


def value_for(patterns: Mapping[str, Value], name: str, field: str) -> Value | None:
    """The value of the most specific pattern that matches a module, whatever their order.

    From the most specific: the full name; a name that ends it, the one of more dotted parts first;
    a regex, which matches the name whole or from behind any of its dots.

    Args:
        patterns: name or regex to value.
        name: full name of the module.
        field: the configuration's field, for the error.

    Raises:
        ConfigError: patterns that are equally specific give different values.
    """
    best: tuple[int, dict[str, Value]] = (-1, {})
    for pattern, value in patterns.items():
        specificity = _specificity(pattern, name)
        if specificity is None or specificity < best[0]:
            continue
        best = (specificity, {**(best[1] if specificity == best[0] else {}), pattern: value})
    values = list(best[1].values())
    if any(value != values[0] for value in values):
        raise ConfigError(
            f"{field} says {' and '.join(f'{p!r}: {v}' for p, v in sorted(best[1].items()))} of "
            f"{name}, and none is more specific: give {name!r} in full"
        )
    return values[0] if values else None


def _specificity(pattern: str, name: str) -> int | None:
    """0 for a regex, the number of dotted parts for a name; None where it does not match."""
    literal = _as_name(pattern)
    if name in (pattern, literal):
        return 1 + name.count(".")
    if literal is not None and not pattern.startswith("^") and name.endswith(f".{literal}"):
        return 1 + literal.count(".")
    return 0 if re.match(rf"(.*\.)?({pattern})$", name) else None


def _as_name(pattern: str) -> str | None:
    """The name that a pattern spells, with or without escapes and anchors; None for a regex."""
    spelt = _SPELT_OUT.fullmatch(pattern)
    if spelt is None:
        return None
    literal = _ESCAPE.sub(r"\1", spelt[1])
    return literal if all(literal.split(".")) else None


def _is_wrapped(parent: nn.Module, part: str) -> bool:
    """Whether a child is what its parent wraps, and so no level of the plain model's own."""
    if isinstance(parent, BaseTunerLayer):
        return part == "base_layer"
    if isinstance(parent, PeftModel | PeftMixedModel):
        return part == "base_model"
    if isinstance(parent, BaseTuner):
        return part == "model"
    return part in _WRAPPERS
