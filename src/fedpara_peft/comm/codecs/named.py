"""Codecs by name, as arguments and payloads give them."""

from __future__ import annotations

import torch

from ..errors import CodecError
from .base import Chain, Codec, Identity
from .cast import Cast
from .quantize import Quantize
from .topk import TopK

_PLAIN: dict[str, Codec] = {
    "identity": Identity(),
    "float16": Cast(torch.float16),
    "bfloat16": Cast(torch.bfloat16),
    "int8": Quantize(8),
    "int4": Quantize(4),
}


def codec_from_name(name: str) -> Codec:
    """The codec of a name such as ``"int8"``, ``"topk:0.1"`` or ``"topk:0.1+int8"``.

    Raises:
        CodecError: there is none of this name.
    """
    codecs = [_single(part) for part in name.split("+")]
    return codecs[0] if len(codecs) == 1 else Chain(*codecs)


def _single(name: str) -> Codec:
    if name in _PLAIN:
        return _PLAIN[name]
    kind, _, value = name.partition(":")
    try:
        fraction = float(value)
    except ValueError:
        fraction = 0.0
    if kind == "topk" and 0 < fraction <= 1:
        return TopK(fraction)
    raise CodecError(
        f"unknown codec {name!r}: use {', '.join(_PLAIN)} or topk:FRACTION with a fraction in "
        "(0, 1], or several joined by '+'"
    )
