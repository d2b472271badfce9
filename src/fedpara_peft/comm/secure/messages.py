"""The messages of a round, as bytes of a length known beforehand.

    header: b"FPSA", version, kind, round, client, digest of the agreement        (26 bytes)

    0 up    public keys               two of 32 bytes
    0 down  everybody's keys          client and two keys, for each that advertised
    1 up    shares                    commitment, then client and sealed shares for each other one
    1 down  everybody's shares        client and sealed shares, from each other one that shared
    2 up    the masked update         packed
    2 down  whose updates came        a bit a client of the cohort
    3 up    unmasking shares          one for each client that shared

All are of one form: what is not, to the last bit, is refused before anything of it is used.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum

from ..errors import PayloadError
from .agreement import Agreement
from .primitives import KEY_BYTES, TAG_BYTES
from .shamir import PRIME, SHARE_BYTES

_MAGIC, _VERSION = b"FPSA", 1
_HEADER = struct.Struct("<4sBBQI8s")
HEADER_BYTES = _HEADER.size
_INDEX = struct.Struct("<I")
KEYS_BYTES = 2 * KEY_BYTES
COMMITMENT_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
#: The client that messages to all are of.
_ALL = 2**32 - 1


class Kind(IntEnum):
    """What a message is."""

    KEYS = 0
    ALL_KEYS = 1
    SHARES = 2
    ALL_SHARES = 3
    MASKED = 4
    SURVIVORS = 5
    UNMASKING = 6


def encoded(agreed: Agreement, kind: Kind, client: int | None, body: bytes) -> bytes:
    """A message; ``client`` sends it or is sent it, None: it goes to all."""
    who = _ALL if client is None else client
    header = _HEADER.pack(_MAGIC, _VERSION, kind, agreed.round, who, agreed.digest)
    return header + body


def body_of(agreed: Agreement, kind: Kind, client: int | None, data: bytes) -> bytes:
    """What follows a message's header, which must be the expected one.

    Raises:
        PayloadError: it is another message.
    """
    if len(data) < HEADER_BYTES:
        raise PayloadError("length", f"{len(data)} bytes end before the header does (cut off?)")
    magic, version, found, round, who, digest = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise PayloadError(
            "malformed", "it is no message of secure aggregation: run one version on both ends"
        )
    if round != agreed.round:
        raise PayloadError("stale", f"it is of round {round + 1}, this is {agreed.round + 1}")
    if digest != agreed.digest:
        raise PayloadError(
            "schema", "it is of another cohort, threshold or model: both ends must use the same"
        )
    if found != kind:
        raise PayloadError("malformed", f"it is of kind {found}, expected {kind.name} ({kind:d})")
    if who != (_ALL if client is None else client):
        raise PayloadError("malformed", f"it is of client {who}, not of {client}")
    return data[HEADER_BYTES:]


def require_length(body: bytes, expected: int) -> bytes:
    """The body itself.

    Raises:
        PayloadError: it is of another length.
    """
    if len(body) != expected:
        raise PayloadError("length", f"{len(body)} bytes after the header, expected {expected}")
    return body


def join_entries(entries: Mapping[int, bytes]) -> bytes:
    """Entries of clients, in their order."""
    return b"".join(_INDEX.pack(client) + entries[client] for client in sorted(entries))


def split_entries(body: bytes, size: int, allowed: Sequence[int]) -> dict[int, bytes]:
    """The inverse of :func:`join_entries`.

    Args:
        body: as it came.
        size: bytes of every entry.
        allowed: clients that may have one.

    Raises:
        PayloadError: it is anything else: another length, order, or a client twice.
    """
    step = _INDEX.size + size
    if len(body) % step or len(body) // step > len(allowed):
        raise PayloadError(
            "length", f"{len(body)} bytes are not entries of {step} for {len(allowed)} clients"
        )
    found: dict[int, bytes] = {}
    last, known = -1, frozenset(allowed)
    for start in range(0, len(body), step):
        (client,) = _INDEX.unpack_from(body, start)
        if client not in known:
            raise PayloadError("not_sampled", f"it has an entry of client {client}, not a peer")
        if client <= last:
            raise PayloadError("duplicate", f"client {client} has two entries, or is out of order")
        found[client] = body[start + _INDEX.size : start + step]
        last = client
    return found


def join_shares(*shares: int) -> bytes:
    """Shares, each of 33 bytes."""
    return b"".join(share.to_bytes(SHARE_BYTES, "big") for share in shares)


def split_shares(data: bytes, count: int) -> list[int]:
    """The inverse of :func:`join_shares`.

    Raises:
        PayloadError: it is another length, or no elements of the field.
    """
    require_length(data, count * SHARE_BYTES)
    found = [
        int.from_bytes(data[start : start + SHARE_BYTES], "big")
        for start in range(0, len(data), SHARE_BYTES)
    ]
    if any(share >= PRIME for share in found):
        raise PayloadError("malformed", "a share is not below the field's prime")
    return found


def join_bits(agreed: Agreement, clients: Sequence[int]) -> bytes:
    """A subset of the cohort, a bit each."""
    bits = sum(1 << (agreed.points[client] - 1) for client in clients)
    return bits.to_bytes(bits_bytes(agreed), "little")


def split_bits(agreed: Agreement, body: bytes) -> tuple[int, ...]:
    """The inverse of :func:`join_bits`.

    Raises:
        PayloadError: it is of another length, or has bits of nobody.
    """
    bits = int.from_bytes(require_length(body, bits_bytes(agreed)), "little")
    if bits >> len(agreed.clients):
        raise PayloadError("not_sampled", "it names clients that are not in the cohort")
    return tuple(c for place, c in enumerate(agreed.clients) if bits >> place & 1)


def bits_bytes(agreed: Agreement) -> int:
    """Bytes of a subset of the cohort."""
    return math.ceil(len(agreed.clients) / 8)


def lengths(agreed: Agreement) -> dict[Kind, int]:
    """Of every message where nobody drops out, to or from each client."""
    n = len(agreed.clients)
    bodies = {
        Kind.KEYS: KEYS_BYTES,
        Kind.ALL_KEYS: n * (_INDEX.size + KEYS_BYTES),
        Kind.SHARES: COMMITMENT_BYTES + (n - 1) * (_INDEX.size + SEALED_BYTES),
        Kind.ALL_SHARES: (n - 1) * (_INDEX.size + SEALED_BYTES),
        Kind.MASKED: agreed.num_bytes,
        Kind.SURVIVORS: bits_bytes(agreed),
        Kind.UNMASKING: n * (_INDEX.size + SHARE_BYTES),
    }
    return {kind: HEADER_BYTES + length for kind, length in bodies.items()}
