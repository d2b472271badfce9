"""Codecs: states made shorter to send, one idea a file."""

from .base import Chain, Codec, Identity
from .cast import Cast
from .named import codec_from_name
from .quantize import Quantize
from .topk import TopK

__all__ = ["Cast", "Chain", "Codec", "Identity", "Quantize", "TopK", "codec_from_name"]
