"""A client's half of a round's secure sum: bytes in, bytes out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError, SecureAggregationError
from .agreement import Agreement, Vector
from .messages import (
    KEYS_BYTES,
    SEALED_BYTES,
    Kind,
    body_of,
    encoded,
    join_entries,
    join_shares,
    split_bits,
    split_entries,
    split_shares,
)
from .primitives import KEY_BYTES, agreed_key, commitment, public_key, seal, unseal
from .shamir import SECRET_BYTES, share


class SecureClient:
    """Hides a client's vector from the server, which learns the cohort's sum.

        y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv)

    over all v that shared their secrets. It answers every message once, in this order: whoever asks
    twice could ask for the share of a client's key and then for that of its mask, which together
    show its vector.

    Args:
        agreed: the round's, as this client knows it, not as the server says.
        client: its index.
        entropy: secret random bytes, so many; never derived from a run's seed.

    Raises:
        SecureAggregationError: it is not of the cohort, or ``cryptography`` is not installed.
    """

    def __init__(
        self, agreed: Agreement, client: int, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        if client not in agreed.points:
            raise SecureAggregationError(f"client {client} is not of the cohort: nothing is sent")
        self._agreed = agreed
        self._client = client
        self._entropy = entropy
        self._sealing_key, self._masking_key, self._own_seed = (
            entropy(KEY_BYTES) for _ in range(3)
        )
        self._keys: dict[int, bytes] = {}
        self._shares: dict[int, tuple[int, ...]] = {}
        self._next = Kind.KEYS

    @property
    def agreed(self) -> Agreement:
        """The round's."""
        return self._agreed

    @property
    def is_done(self) -> bool:
        """Whether it has answered all messages, and forgotten its secrets."""
        return self._next is Kind.UNMASKING

    def saved(self) -> bytes:
        """What it knows, its secrets too, for another process to go on with between two messages.

        Who keeps it must see that nobody else reads it, and that it is restored once: a machine
        that goes on twice from one place answers twice.
        """
        known = {
            "next": int(self._next),
            "secrets": [
                s.hex() for s in (self._sealing_key, self._masking_key, self._own_seed)
            ],
            "keys": {client: keys.hex() for client, keys in self._keys.items()},
            "shares": self._shares,
        }  # fmt: skip
        return json.dumps(known).encode()

    @classmethod
    def restored(cls, agreed: Agreement, client: int, data: bytes) -> SecureClient:
        """The inverse of :meth:`saved`; arguments as those of the class."""
        found, known = cls(agreed, client), json.loads(data)
        found._sealing_key, found._masking_key, found._own_seed = (
            bytes.fromhex(secret) for secret in known["secrets"]
        )
        found._next = Kind(known["next"])
        found._keys = {int(c): bytes.fromhex(keys) for c, keys in known["keys"].items()}
        found._shares = {int(c): tuple(both) for c, both in known["shares"].items()}
        return found

    def advertise(self) -> bytes:
        """Public keys: one for what clients send each other, one for masks."""
        self._step(Kind.KEYS, Kind.ALL_KEYS)
        keys = public_key(self._sealing_key) + public_key(self._masking_key)
        return self._message(Kind.KEYS, keys)

    def share(self, data: bytes) -> bytes:
        """Shares of its masking key and its own mask's seed, sealed for every other client.

        Args:
            data: everybody's keys.

        Raises:
            PayloadError: it is not that.
            SecureAggregationError: too few clients advertised keys.
        """
        agreed = self._agreed
        body = body_of(agreed, Kind.ALL_KEYS, None, data)
        keys = split_entries(body, KEYS_BYTES, agreed.clients)
        own = public_key(self._sealing_key) + public_key(self._masking_key)
        if keys.get(self._client) != own:
            raise PayloadError("malformed", "its own keys are not among everybody's")
        if len(set(keys.values())) < len(keys):
            raise PayloadError("duplicate", "two clients have the same keys")
        self._require_enough(len(keys), "advertised keys")
        self._step(Kind.ALL_KEYS, Kind.ALL_SHARES)
        self._keys = keys
        points = [agreed.points[client] for client in agreed.clients]
        parts = [
            share(secret, agreed.threshold, points, self._entropy)
            for secret in (self._own_seed, self._masking_key)
        ]
        both_of = dict(zip(agreed.clients, zip(*parts, strict=True), strict=True))
        shares = {client: both_of[client] for client in keys}
        self._shares = {self._client: shares.pop(self._client)}
        sealed = {
            client: seal(
                self._sealing(client), self._client, join_shares(*both), self._between(client)
            )
            for client, both in shares.items()
        }
        fixed = commitment(self._own_seed, agreed.purpose("seed"))
        return self._message(Kind.SHARES, fixed + join_entries(sealed))

    def mask(self, data: bytes, values: NDArray[np.int64], weight: int, train_loss: float) -> bytes:
        """Its masked vector.

        Args:
            data: shares of the other clients.
            values: integers, as agreed on.
            weight: how much they count.
            train_loss: a finite number.

        Raises:
            PayloadError: the shares are not what clients sealed for this one.
            SecureAggregationError: too few clients shared, or the vector is not as agreed on.
        """
        agreed = self._agreed
        vector: Vector = agreed.vector(values, weight, train_loss)
        body = body_of(agreed, Kind.ALL_SHARES, self._client, data)
        peers = [client for client in self._keys if client != self._client]
        sealed = split_entries(body, SEALED_BYTES, peers)
        self._require_enough(len(sealed) + 1, "shared their secrets")
        found = {}
        for client, text in sealed.items():
            opened = unseal(self._sealing(client), client, text, self._between(client, sent=False))
            found[client] = tuple(split_shares(opened, 2))
        self._step(Kind.ALL_SHARES, Kind.SURVIVORS)
        self._shares.update(found)
        vector = vector.plus(agreed.mask(self._own_seed))
        for client in sealed:
            key = pair_key(agreed, self._masking_key, self._keys[client])
            vector = vector.plus(agreed.mask(key), 1 if client > self._client else -1)
        return self._message(Kind.MASKED, vector.pack())

    def unmask(self, data: bytes) -> bytes:
        """One share of each client that shared: of the mask if its vector came, else of the key.

        Args:
            data: whose vectors came.

        Raises:
            PayloadError: it is not that.
            SecureAggregationError: it asks for more than a sum of enough clients needs.
        """
        agreed = self._agreed
        if self._next is Kind.UNMASKING:
            raise SecureAggregationError(
                f"client {self._client} was asked a second time for shares of round "
                f"{agreed.round + 1}: a key's and a mask's together would show a single update, so "
                "it answers once"
            )
        came = split_bits(agreed, body_of(agreed, Kind.SURVIVORS, None, data))
        if strangers := [client for client in came if client not in self._shares]:
            raise PayloadError(
                "not_sampled", f"clients {strangers[:3]} sent vectors, but had shared no secrets"
            )
        if self._client not in came:
            raise PayloadError("malformed", "its own vector is said not to have come")
        self._require_enough(len(came), "sent vectors")
        self._step(Kind.SURVIVORS, Kind.UNMASKING)
        chosen = {
            client: join_shares(both[0] if client in came else both[1])
            for client, both in self._shares.items()
        }
        self._shares, self._sealing_key, self._masking_key, self._own_seed = {}, b"", b"", b""
        return self._message(Kind.UNMASKING, join_entries(chosen))

    def _step(self, expected: Kind, following: Kind) -> None:
        if self._next is not expected:
            raise SecureAggregationError(
                f"client {self._client} is asked for the answer to {expected.name}, but waits for "
                f"{self._next.name}: every message is answered once, and in order"
            )
        self._next = following

    def _require_enough(self, count: int, did: str) -> None:
        if count < self._agreed.threshold:
            raise SecureAggregationError(
                f"{count} clients {did}, the threshold is {self._agreed.threshold} of "
                f"{len(self._agreed.clients)}: nothing more is sent in this round"
            )

    def _sealing(self, other: int) -> bytes:
        public = self._keys[other][:KEY_BYTES]
        return agreed_key(self._sealing_key, public, self._agreed.purpose("shares"))

    def _between(self, other: int, *, sent: bool = True) -> bytes:
        ends = (self._client, other) if sent else (other, self._client)
        return self._agreed.purpose("shares") + b"|%d|%d" % ends

    def _message(self, kind: Kind, body: bytes) -> bytes:
        return encoded(self._agreed, kind, self._client, body)


def pair_key(agreed: Agreement, masking_key: bytes, keys: bytes) -> bytes:
    """The key of the mask of two clients, from one's private key and the other's public ones."""
    return agreed_key(masking_key, keys[KEY_BYTES:], agreed.purpose("mask"))


assert KEY_BYTES == SECRET_BYTES  # what is shared are keys
