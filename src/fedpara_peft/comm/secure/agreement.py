"""What both ends know of a round's sum before anything is sent."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import SecureAggregationError
from .packing import Ring, Words

#: Of a vector's numbers beside the values: the client's weight, and its weighted loss.
NUMBERS = 2
_LOSS_UNIT, _LARGEST_LOSS = 2.0**-16, 2.0**15
#: Bounds on which the numbers' 64 bits rest: 2¹⁶ clients of weight 2¹⁵ and loss 2¹⁵ in 2⁻¹⁶.
LARGEST_COHORT, LARGEST_WEIGHT = 2**16, 2**15


@dataclass(frozen=True)
class Summed:
    """What the server learns of a cohort.

    Attributes:
        values: Σ_i w_i q_i, of integers.
        weight: Σ_i w_i.
        train_loss: Σ_i w_i loss_i / Σ_i w_i, to 2⁻¹⁶.
        clients: whose vectors are in the sum.
    """

    values: NDArray[np.int64]
    weight: int
    train_loss: float
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """A round's cohort, threshold and vectors, the same at both ends.

    Attributes:
        round: rounds completed.
        clients: the cohort's indices, ascending.
        threshold: t: so many clients are in the sum at least, and as many help to unmask it.
        numel: values of an update.
        levels: s: values are integers in [-s, s].
        largest_weight: W: weights are integers in [1, W].
        context: what else the round is of (the model's schema, the scale), in short.
        noise: the most that noise of all clients adds to a value of the sum.

    Raises:
        SecureAggregationError: no sum could be made so, or it would hide too little.
    """

    round: int
    clients: tuple[int, ...]
    threshold: int
    numel: int
    levels: int
    largest_weight: int = 1
    context: bytes = b""
    noise: int = 0
    values: Ring = field(init=False)
    numbers: Ring = field(init=False)

    def __post_init__(self) -> None:
        n, t = len(self.clients), self.threshold
        if list(self.clients) != sorted(set(self.clients)) or n > LARGEST_COHORT:
            raise SecureAggregationError(
                f"a cohort of {n} clients is not one of at most {LARGEST_COHORT}, each once and in "
                "order"
            )
        if not (2 <= t <= n and 2 * t > n):
            # With 2 t ≤ n one half could be asked for a client's key and the other for its mask.
            raise SecureAggregationError(
                f"a threshold of {t} of {n} clients hides nothing: it must be at least 2 and more "
                "than half of the cohort; sample more clients, or lower secure_drop_outs"
            )
        if not 1 <= self.largest_weight <= LARGEST_WEIGHT:
            raise SecureAggregationError(
                f"weights up to {self.largest_weight} are not in [1, {LARGEST_WEIGHT}]: lower "
                "secure_max_examples"
            )
        largest = n * self.largest_weight * self.levels + self.noise
        object.__setattr__(self, "values", Ring.of_sums(largest, self.numel))
        object.__setattr__(self, "numbers", Ring(64, NUMBERS))

    @functools.cached_property
    def digest(self) -> bytes:
        """A short name of all of it, in every message."""
        facts = (
            self.clients, self.threshold, self.numel, self.levels, self.largest_weight,
            self.context, *([self.noise] if self.noise else []),
        )  # fmt: skip
        return hashlib.sha256(repr(facts).encode()).digest()[:8]

    @functools.cached_property
    def points(self) -> dict[int, int]:
        """Where the clients' shares are evaluated: their places in the cohort, from 1."""
        return {client: place for place, client in enumerate(self.clients, 1)}

    @property
    def num_bytes(self) -> int:
        """Of a packed vector."""
        return self.values.num_bytes + self.numbers.num_bytes

    def purpose(self, name: str) -> bytes:
        """What a key is for: a purpose in this round and no other."""
        return b"fedpara secure aggregation 1|%s|%d|" % (name.encode(), self.round) + self.digest

    def vector(self, values: NDArray[np.int64], weight: int, train_loss: float) -> Vector:
        """A client's integers, weighted, with what else is summed.

        Raises:
            SecureAggregationError: they are beyond what was agreed on, so the sum would be wrong.
        """
        largest = int(np.abs(values).max(initial=0))
        if len(values) != self.numel or largest > self.levels + self.noise:
            raise SecureAggregationError(
                f"{len(values)} integers up to {largest} cannot be summed: agreed on are "
                f"{self.numel} up to {self.levels + self.noise}"
            )
        if not 1 <= weight <= self.largest_weight:
            raise SecureAggregationError(
                f"a weight of {weight} cannot be summed: agreed on are 1 to {self.largest_weight}"
            )
        loss = round(weight * min(max(train_loss, -_LARGEST_LOSS), _LARGEST_LOSS) / _LOSS_UNIT)
        numbers = np.array([weight, loss], np.int64)
        return Vector(self, self.values.words(values * weight), self.numbers.words(numbers))

    def zero(self) -> Vector:
        """The empty sum."""
        return Vector(
            self,
            np.zeros(self.numel, self.values.dtype),
            np.zeros(NUMBERS, self.numbers.dtype),
        )

    def unpack(self, data: bytes) -> Vector:
        """The inverse of :meth:`Vector.pack`.

        Raises:
            PayloadError: it is no packed vector.
        """
        cut = self.values.num_bytes
        return Vector(self, self.values.unpack(data[:cut]), self.numbers.unpack(data[cut:]))

    def mask(self, key: bytes) -> Vector:
        """The vector that a key stands for; one stream for both parts, one after the other."""
        skip = self.values.mask_blocks
        return Vector(self, self.values.mask(key), self.numbers.mask(key, skip))


@dataclass(frozen=True)
class Vector:
    """Values and numbers as words; see :class:`Agreement`."""

    agreement: Agreement
    values: Words
    numbers: Words

    def plus(self, other: Vector, sign: int = 1) -> Vector:
        """The sum or difference; it may run over the modulus, for that divides a word's."""
        if sign > 0:
            return Vector(self.agreement, self.values + other.values, self.numbers + other.numbers)
        return Vector(self.agreement, self.values - other.values, self.numbers - other.numbers)

    def pack(self) -> bytes:
        """As bytes, of the agreed length."""
        rings = self.agreement
        values, numbers = rings.values.reduced(self.values), rings.numbers.reduced(self.numbers)
        return rings.values.pack(values) + rings.numbers.pack(numbers)

    def summed(self, clients: tuple[int, ...]) -> Summed:
        """What a sum says, once nothing masks it.

        Raises:
            SecureAggregationError: these clients cannot have sent it.
        """
        agreed = self.agreement
        values = agreed.values.integers(self.values)
        weight, loss = (int(v) for v in agreed.numbers.integers(self.numbers))
        if not len(clients) <= weight <= len(clients) * agreed.largest_weight or (
            int(np.abs(values).max(initial=0)) > weight * agreed.levels + agreed.noise
        ):
            raise SecureAggregationError(
                f"the sum of {len(clients)} clients is beyond what they can have sent: one of them "
                "sent another vector than was agreed on, or other shares than it was given"
            )
        return Summed(values, weight, loss * _LOSS_UNIT / weight, clients)
