"""Integers of a modulus 2^k as words to add up, and as exactly k bits each to send."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError, SecureAggregationError
from .primitives import stream

#: Unsigned integers modulo 2^k, in the next wider word of the machine.
Words = NDArray[np.unsignedinteger]
_WORD_BITS = (8, 16, 32, 64)
#: How many values are spread out into bits at once: a multiple of 8, so that bytes end there.
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Ring:
    """Vectors of integers modulo 2^k.

    Attributes:
        bits: k, from 1 to 64.
        numel: entries of a vector.

    Raises:
        SecureAggregationError: no word of the machine is so wide.
    """

    bits: int
    numel: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 64:
            raise SecureAggregationError(
                f"a sum of {self.bits} bits fits no word of 64: lower secure_bits or "
                "secure_max_examples"
            )

    @classmethod
    def of_sums(cls, largest: int, numel: int) -> Ring:
        """The smallest modulus that tells all sums in [-largest, largest] apart."""
        return cls(max(1, (2 * largest).bit_length()), numel)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of a word, little-endian."""
        width = next(bits for bits in _WORD_BITS if bits >= self.bits)
        return np.dtype(f"<u{width // 8}")

    @property
    def num_bytes(self) -> int:
        """Of a packed vector: k bits an entry, the last byte filled up with zeros."""
        return math.ceil(self.bits * self.numel / 8)

    def words(self, values: NDArray[np.int64]) -> Words:
        """Signed integers as elements of the ring."""
        return self.reduced(values.astype("<u8").astype(self.dtype))

    def reduced(self, words: Words) -> Words:
        """Words modulo 2^k; adding and subtracting them may run over, for 2^k divides a word."""
        if self.bits == 8 * self.dtype.itemsize:
            return words
        return words & self.dtype.type((1 << self.bits) - 1)

    def integers(self, words: Words) -> NDArray[np.int64]:
        """The signed integers, in [-2^(k-1), 2^(k-1)), that elements stand for."""
        wide = self.reduced(words).astype(np.uint64)
        shift = np.uint64(64 - self.bits)
        return (wide << shift).view(np.int64) >> np.int64(shift)

    def mask(self, key: bytes, skip: int = 0) -> Words:
        """A uniform vector that a key stands for: whole words of ChaCha20's stream, modulo 2^k.

        Args:
            key: used for nothing else.
            skip: blocks of 64 bytes at the stream's beginning that others have.
        """
        found = stream(key, self.numel * self.dtype.itemsize, counter=skip)
        return self.reduced(np.frombuffer(found, self.dtype))

    @property
    def mask_blocks(self) -> int:
        """Blocks of the stream that :meth:`mask` takes."""
        return math.ceil(self.numel * self.dtype.itemsize / 64)

    def pack(self, words: Words) -> bytes:
        """Elements as bytes: bit j of entry i is bit i k + j, lowest first."""
        places = np.arange(self.bits, dtype=self.dtype)
        one = self.dtype.type(1)
        parts = []
        for start in range(0, self.numel, _AT_ONCE):
            some = words[start : start + _AT_ONCE, None]
            bits = ((some >> places) & one).astype(np.uint8)
            parts.append(np.packbits(bits.reshape(-1), bitorder="little").tobytes())
        return b"".join(parts)

    def unpack(self, data: bytes) -> Words:
        """The inverse of :meth:`pack`.

        Raises:
            PayloadError: it is of another length, or not filled up with zeros.
        """
        if len(data) != self.num_bytes:
            raise PayloadError(
                "length", f"{len(data)} bytes of packed values, agreed on {self.num_bytes}"
            )
        unused = 8 * self.num_bytes - self.bits * self.numel
        if unused and data[-1] >> (8 - unused):
            raise PayloadError("malformed", "the bits after the last packed value are not zero")
        raw = np.frombuffer(data, np.uint8)
        found = np.empty(self.numel, self.dtype)
        places = np.arange(self.bits, dtype=self.dtype)
        for start in range(0, self.numel, _AT_ONCE):
            count = min(_AT_ONCE, self.numel - start)
            first, last = start * self.bits // 8, math.ceil((start + count) * self.bits / 8)
            bits = np.unpackbits(raw[first:last], bitorder="little")[: count * self.bits]
            spread = bits.reshape(count, self.bits).astype(self.dtype) << places
            found[start : start + count] = np.bitwise_or.reduce(spread, axis=1)
        return found
