"""Codecs by name, as arguments, the command line and payloads give them."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import CodecError
from .base import Chain, Codec, Identity

_PLAIN: dict[str, Codec] = {}
_MADE: dict[str, tuple[str, Callable[[str], Codec]]] = {}


def register(name: str, codec: Codec | Callable[[str], Codec]) -> None:
    """Give a codec a name; a codec's file ends with it.

    Args:
        name: its text, such as ``"int8"``, or ``"topk:FRACTION"`` for one that takes a value.
        codec: the codec, or what makes it of the value's text (a ValueError: it cannot).

    Raises:
        CodecError: a run would not know the codec by this name.
    """
    if "+" in name or (isinstance(codec, Codec) and str(codec) != name):
        raise CodecError(
            f"codec {codec} cannot have the name {name!r}: a name is the codec's own text, "
            "without '+', which joins several"
        )
    if isinstance(codec, Codec):
        _PLAIN[name] = codec
    else:
        _MADE[name.partition(":")[0]] = (name, codec)


def codec_names(*, dense: bool = False) -> list[str]:
    """All names, as an error or a help text shows them.

    Args:
        dense: those alone that suit the global state, too.
    """
    if dense:
        return [name for name, codec in _PLAIN.items() if codec.dense]
    return [*_PLAIN, *(name for name, _ in _MADE.values())]


def codec_from_name(name: str) -> Codec:
    """The codec of a name such as ``"int8"``, ``"topk:0.1"`` or ``"topk:0.1+int8"``.

    Raises:
        CodecError: there is none of this name.
    """
    codecs = [_single(part) for part in name.split("+")]
    return codecs[0] if len(codecs) == 1 else Chain(*codecs)


def as_codec(given: Codec | str) -> Codec:
    """A codec from itself or its name.

    Raises:
        CodecError: there is none of this name.
    """
    return given if isinstance(given, Codec) else codec_from_name(given)


def _single(name: str) -> Codec:
    if name in _PLAIN:
        return _PLAIN[name]
    kind, _, value = name.partition(":")
    if kind in _MADE:
        try:
            return _MADE[kind][1](value)
        except ValueError:  # CodecErrors are, too
            pass
    raise CodecError(
        f"unknown codec {name!r}: use {', '.join(codec_names())}, or several joined by '+'; one of "
        "your own is given as a Codec"
    )


register("identity", Identity())
