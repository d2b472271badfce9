"""The cryptography, all of it from the package ``cryptography``: an optional extra.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20 as a stream of masks and
ChaCha20-Poly1305 for what one client sends another (RFC 8439).
"""

from __future__ import annotations

import functools
import hashlib
from types import SimpleNamespace

from ..errors import PayloadError, SecureAggregationError

KEY_BYTES = 32
#: What sealing adds to a text.
TAG_BYTES = 16
#: Of the stream: 2³² blocks of 64 bytes, then the counter would begin again.
LONGEST_STREAM_BYTES = 64 * 2**32


@functools.cache
def _library() -> SimpleNamespace:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.asymmetric.x25519 import (
            X25519PrivateKey,
            X25519PublicKey,
        )
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError:
        raise SecureAggregationError(
            "secure_aggregation needs cryptography: pip install 'fedpara-peft[secure]'"
        ) from None
    return SimpleNamespace(
        InvalidTag=InvalidTag,
        PrivateKey=X25519PrivateKey,
        PublicKey=X25519PublicKey,
        Cipher=Cipher,
        ChaCha20=algorithms.ChaCha20,
        Sealing=ChaCha20Poly1305,
        SHA256=SHA256,
        HKDF=HKDF,
    )


def require_library() -> None:
    """Raise unless ``cryptography`` is installed.

    Raises:
        SecureAggregationError: it is not.
    """
    _library()


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private one, 32 bytes each."""
    found: bytes = _library().PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return found


def agreed_key(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """What two clients know and nobody else: HKDF of their X25519 secret, for one purpose.

    Raises:
        PayloadError: the other's public key is none: whoever sent it would know the secret.
    """
    library = _library()
    own = library.PrivateKey.from_private_bytes(private)
    try:
        secret = own.exchange(library.PublicKey.from_public_bytes(public))
    except ValueError:
        raise PayloadError(
            "malformed", "a public key is a point of low order, which hides nothing"
        ) from None
    derive = library.HKDF(library.SHA256(), KEY_BYTES, salt=None, info=purpose)
    found: bytes = derive.derive(secret)
    return found


def commitment(secret: bytes, purpose: bytes) -> bytes:
    """What fixes a random secret without telling it: SHA-256 of both."""
    return hashlib.sha256(len(purpose).to_bytes(8, "big") + purpose + secret).digest()


def seal(key: bytes, sender: int, text: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate; a key serves one message of each of its two holders.

    Args:
        key: fresh in every round.
        sender: of the two who hold the key; the nonce.
        text: what to send.
        context: what else must be as it was.
    """
    found: bytes = _library().Sealing(key).encrypt(sender.to_bytes(12, "big"), text, context)
    return found


def unseal(key: bytes, sender: int, sealed: bytes, context: bytes) -> bytes:
    """The inverse of :func:`seal`.

    Raises:
        PayloadError: it was not sealed so.
    """
    library = _library()
    try:
        found: bytes = library.Sealing(key).decrypt(sender.to_bytes(12, "big"), sealed, context)
    except library.InvalidTag:
        raise PayloadError(
            "malformed", f"what client {sender} sealed is not what arrived: its seal is broken"
        ) from None
    return found


def stream(key: bytes, num_bytes: int, nonce: bytes = bytes(12), counter: int = 0) -> bytes:
    """ChaCha20's key stream (RFC 8439, section 2.4).

    Args:
        key: 32 bytes that no other stream has.
        num_bytes: its length.
        nonce: 12 bytes.
        counter: of the first block of 64 bytes.

    Raises:
        SecureAggregationError: it would repeat itself.
    """
    if num_bytes > LONGEST_STREAM_BYTES - 64 * counter:
        raise SecureAggregationError(
            f"a mask of {num_bytes} bytes is longer than ChaCha20's stream: send fewer values"
        )
    library = _library()
    start = counter.to_bytes(4, "little") + nonce
    found: bytes = (
        library.Cipher(library.ChaCha20(key, start), mode=None).encryptor().update(bytes(num_bytes))
    )
    return found
