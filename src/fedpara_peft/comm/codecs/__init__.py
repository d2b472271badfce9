"""Codecs: states made shorter to send, one idea a file, named in its last lines."""

from .base import Chain, Codec, Identity
from .cast import Cast
from .named import as_codec, codec_from_name, codec_names, register
from .quantize import Quantize
from .topk import TopK

__all__ = [
    "Cast",
    "Chain",
    "Codec",
    "Identity",
    "Quantize",
    "TopK",
    "as_codec",
    "codec_from_name",
    "codec_names",
    "register",
]
