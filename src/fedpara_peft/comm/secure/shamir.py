"""Shamir's secret sharing over a prime field (Communications of the ACM 22, 1979).

    f(x) = s + a₁ x + … + a_{t-1} x^{t-1}   mod p,   share of x: f(x),   s = f(0)

Any t shares give f by interpolation; fewer say nothing of s, for every s fits them equally well.
Every share is made by the same operations whatever the secret is; Python's integers are not of
constant time, which whoever shares a machine with a client could measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import SecureAggregationError

#: p, the smallest prime above 2²⁵⁶: every secret of 32 bytes is an element.
PRIME = 2**256 + 297
#: Bytes of a secret, and of a share.
SECRET_BYTES, SHARE_BYTES = 32, 33
#: So much longer than p that the remainder is uniform up to 2⁻¹²⁸.
_WIDE_BYTES = 49


def share(
    secret: bytes, threshold: int, points: Sequence[int], entropy: Callable[[int], bytes]
) -> list[int]:
    """Shares of a secret, one a point.

    Args:
        secret: 32 bytes.
        threshold: t, so many shares give the secret.
        points: where the polynomial is evaluated: distinct, in [1, p).
        entropy: secret random bytes, so many.

    Raises:
        SecureAggregationError: there cannot be such shares.
    """
    if len(secret) != SECRET_BYTES:
        raise SecureAggregationError(
            f"a secret has {len(secret)} bytes, shared are {SECRET_BYTES}: derive one of that "
            "length from it"
        )
    _require_points(points)
    if not 1 <= threshold <= len(points):
        raise SecureAggregationError(
            f"{threshold} of {len(points)} shares cannot give a secret: take a threshold between "
            "1 and the number of shares"
        )
    drawn = (int.from_bytes(entropy(_WIDE_BYTES), "big") % PRIME for _ in range(threshold - 1))
    coefficients = [int.from_bytes(secret, "big"), *drawn]
    return [_value_at(coefficients, point) for point in points]


def reconstruct(shares: Mapping[int, int], threshold: int) -> bytes:
    """The secret of some shares, from as many of them as are needed.

        f(0) = Σ_i f(x_i) Π_{j≠i} x_j / (x_j - x_i)   mod p

    Args:
        shares: by point.
        threshold: t.

    Raises:
        SecureAggregationError: they are too few, or of no secret of 32 bytes.
    """
    if len(shares) < threshold:
        raise SecureAggregationError(
            f"{len(shares)} shares of a secret came, {threshold} are needed: nothing is revealed"
        )
    used = sorted(shares)[:threshold]
    _require_points(used)
    total = 0
    for i in used:
        above = below = 1
        for j in used:
            if j != i:
                above = above * j % PRIME
                below = below * (j - i) % PRIME
        total = (total + shares[i] * above * pow(below, -1, PRIME)) % PRIME
    if total >= 2 ** (8 * SECRET_BYTES):
        raise SecureAggregationError(
            "the shares are of no secret: one of them is not what its client was sent"
        )
    return total.to_bytes(SECRET_BYTES, "big")


def _value_at(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def _require_points(points: Sequence[int]) -> None:
    if len(set(points)) < len(points) or not all(0 < point < PRIME for point in points):
        raise SecureAggregationError(
            f"shares at the points {list(points)[:5]!s:.80} are not at distinct ones in [1, p): "
            "number the clients from 1"
        )
