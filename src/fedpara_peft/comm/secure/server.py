"""The server's half of a round's secure sum: bytes in, bytes out, and the sum at the end."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import PayloadError, SecureAggregationError
from .agreement import Agreement, Summed
from .client import pair_key
from .messages import (
    COMMITMENT_BYTES,
    KEYS_BYTES,
    SEALED_BYTES,
    Kind,
    body_of,
    encoded,
    join_bits,
    join_entries,
    require_length,
    split_entries,
    split_shares,
)
from .primitives import KEY_BYTES, commitment, public_key
from .shamir import SHARE_BYTES, reconstruct


class SecureServer:
    """Collects a cohort's messages stage by stage; see :class:`~.client.SecureClient`.

        Σ_u x_u = Σ_u y_u - Σ_u PRG(b_u) - Σ_v Σ_u ± PRG(s_uv),   u ∈ U₃, v ∈ U₂ without U₃

    U₂ are the clients that shared, U₃ those whose vectors came. Of a client of U₃ it learns b_u, of
    the others of U₂ the key, and of nobody both: that is all that t clients tell it.

    Args:
        agreed: the round's.

    Attributes:
        came: whose vectors came, U₃.
    """

    def __init__(self, agreed: Agreement) -> None:
        self._agreed = agreed
        self._stage: Kind | None = Kind.KEYS
        self._keys: dict[int, bytes] = {}
        self._commitments: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._total = agreed.zero()
        self._unmasking: dict[int, dict[int, int]] = {}
        self.came: list[int] = []

    def keys(self, client: int, data: bytes) -> None:
        """Take a client's public keys.

        Raises:
            PayloadError: they are not that, or it is not their time.
        """
        body = self._taken(Kind.KEYS, client, data, self._keys, self._agreed.clients)
        if require_length(body, KEYS_BYTES) in self._keys.values():
            raise PayloadError("duplicate", f"client {client} has another client's keys")
        self._keys[client] = body

    def all_keys(self) -> bytes:
        """Everybody's keys, for each client that advertised; no more are taken.

        Raises:
            SecureAggregationError: fewer than the threshold.
        """
        self._ends(Kind.KEYS, Kind.SHARES, len(self._keys), "advertised keys")
        return encoded(self._agreed, Kind.ALL_KEYS, None, join_entries(self._keys))

    def shares(self, client: int, data: bytes) -> None:
        """Take a client's sealed shares.

        Raises:
            PayloadError: they are not that, or it is not their time.
        """
        body = self._taken(Kind.SHARES, client, data, self._sealed, self._keys)
        peers = [other for other in self._keys if other != client]
        sealed = split_entries(body[COMMITMENT_BYTES:], SEALED_BYTES, peers)
        if len(sealed) < len(peers) or len(body) < COMMITMENT_BYTES:
            raise PayloadError("keys", f"client {client} has shares for {len(sealed)} peers only")
        self._commitments[client] = body[:COMMITMENT_BYTES]
        self._sealed[client] = sealed

    def all_shares(self) -> dict[int, bytes]:
        """For each client that shared what the others sealed for it; no more are taken.

        Raises:
            SecureAggregationError: fewer than the threshold.
        """
        self._ends(Kind.SHARES, Kind.MASKED, len(self._sealed), "shared their secrets")
        found = {
            client: {c: sealed[client] for c, sealed in self._sealed.items() if c != client}
            for client in sorted(self._sealed)
        }
        return {
            client: encoded(self._agreed, Kind.ALL_SHARES, client, join_entries(entries))
            for client, entries in found.items()
        }

    def masked(self, client: int, data: bytes) -> None:
        """Add a client's masked vector.

        Raises:
            PayloadError: it is not that, or it is not its time.
        """
        body = self._taken(Kind.MASKED, client, data, self.came, self._sealed)
        self._total = self._total.plus(self._agreed.unpack(body))
        self.came.append(client)

    def survivors(self) -> bytes:
        """Whose vectors came, for each of them; no more are taken.

        Raises:
            SecureAggregationError: fewer than the threshold: no client would help to unmask.
        """
        self._ends(Kind.MASKED, Kind.UNMASKING, len(self.came), "sent masked updates")
        return encoded(self._agreed, Kind.SURVIVORS, None, join_bits(self._agreed, self.came))

    def unmasking(self, client: int, data: bytes) -> None:
        """Take a client's shares of what masks the sum.

        Raises:
            PayloadError: they are not that, or it is not their time.
        """
        body = self._taken(Kind.UNMASKING, client, data, self._unmasking, self.came)
        found = split_entries(body, SHARE_BYTES, list(self._sealed))
        if found.keys() != self._sealed.keys():
            raise PayloadError("keys", f"client {client} has shares of {len(found)} clients only")
        self._unmasking[client] = {c: split_shares(s, 1)[0] for c, s in found.items()}

    def total(self) -> Summed:
        """The sum over all whose vectors came.

        Raises:
            SecureAggregationError: fewer than the threshold helped, or someone's shares are wrong.
        """
        agreed, purpose = self._agreed, self._agreed.purpose("seed")
        self._ends(Kind.UNMASKING, None, len(self._unmasking), "helped to unmask")
        total, came = self._total, sorted(self.came)
        for client in sorted(self._sealed):
            secret = self._secret(client)
            if client in came:
                self._require(commitment(secret, purpose) == self._commitments[client], client)
                total = total.plus(agreed.mask(secret), -1)
                continue
            self._require(public_key(secret) == self._keys[client][KEY_BYTES:], client)
            for other in came:  # what `other` added for this client
                mask = agreed.mask(pair_key(agreed, secret, self._keys[other]))
                total = total.plus(mask, -1 if client > other else 1)
        return total.summed(tuple(came))

    def _secret(self, client: int) -> bytes:
        """Of a client whose vector came its own mask's seed, of another one its masking key."""
        points = self._agreed.points
        shares = {points[helper]: found[client] for helper, found in self._unmasking.items()}
        return reconstruct(shares, self._agreed.threshold)

    def _require(self, right: bool, client: int) -> None:
        if not right:
            raise SecureAggregationError(
                f"the shares of client {client} give another secret than it fixed: one of the "
                "clients that helped sent a wrong one; run the round again"
            )

    def _taken(
        self,
        kind: Kind,
        client: int,
        data: bytes,
        before: Collection[int],
        allowed: Collection[int],
    ) -> bytes:
        """A message's body, if it is its time and its client's first."""
        if self._stage is not kind:
            raise PayloadError("stale", f"{kind.name} of client {client} came too late or early")
        if client not in allowed:
            raise PayloadError("not_sampled", f"client {client} was not asked for {kind.name}")
        if client in before:
            raise PayloadError("duplicate", f"client {client} sent {kind.name} twice")
        return body_of(self._agreed, kind, client, data)

    def _ends(self, stage: Kind, following: Kind | None, count: int, did: str) -> None:
        """Go on to the next stage, unless too few clients are left."""
        if self._stage is not stage:
            raise SecureAggregationError(f"{stage.name} is not the round's present stage")
        agreed = self._agreed
        if count < agreed.threshold:
            raise SecureAggregationError(
                f"{count} of {len(agreed.clients)} clients {did}, the threshold is "
                f"{agreed.threshold}: the round stops, and nothing of any update is revealed; run "
                "it again when more clients stay, or allow for more with secure_drop_outs"
            )
        self._stage = following
