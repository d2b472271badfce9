"""What a client does with its update before anything of it leaves: round, weigh, mask."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence

from ...comm.payload import Payload, PayloadSize
from ...comm.schema import schema_of
from ...comm.secure.agreement import Agreement
from ...comm.secure.client import SecureClient
from ...comm.secure.messages import HEADER_BYTES
from ...comm.secure.noise import discrete_gaussian
from ...comm.secure.primitives import KEY_BYTES
from ..arguments import FederatedArguments
from ..client.turn import Sealed
from ..random import torch_generator
from ..server.privacy import clipped
from ..state import ClientUpdate
from .fit import fixed_range, noise_std

logger = logging.getLogger(__name__)

#: From which share of clamped entries on a client says so.
_MANY = 0.01


class Sealer:
    """The clients' half, in a simulation of all of them: each one's machine in the present round.

    Args:
        args: the run's settings.
    """

    def __init__(self, args: FederatedArguments) -> None:
        self._args = args
        self._range = fixed_range(args)
        self._agreed: Agreement | None = None
        self._machines: Mapping[int, SecureClient] = {}
        self._shares: Mapping[int, bytes] = {}
        self._noise_seed: int | None = None
        self._told = False

    def begin(
        self,
        agreed: Agreement,
        machines: Mapping[int, SecureClient],
        shares: Mapping[int, bytes],
        noise_seed: int | None = None,
    ) -> None:
        """A round's clients are about to train.

        Args:
            agreed: the round's.
            machines: of every client.
            shares: what each was sent of the others' secrets.
            noise_seed: of clients' shares of the noise; None: of keys that are nowhere else.
        """
        self._agreed, self._machines, self._shares = agreed, machines, shares
        self._noise_seed = noise_seed

    def __call__(self, update: ClientUpdate, round: int) -> Sealed:
        """The masked update, and what the sum has of it."""
        assert self._agreed is not None
        names, client = names_of(list(update.update)), update.client
        generator = torch_generator(self._args.seed, round, client, "secure rounding")
        state, loss, std = update.update, update.train_loss, self._noise_std
        if std:  # the loss has no noise, so the sum is to have no loss
            state, loss = clipped(state, self._args.clip_update_norm or 0.0), 0.0
        integers, clamped = self._range.integers(state, names, generator)
        if clamped > _MANY * len(integers) and not self._told:
            self._told = True
            logger.warning(
                "round %d: %.0f%% of a client's entries were beyond secure_clip=%g and clamped: "
                "raise it, or lower learning_rate",
                round + 1, 100 * clamped / len(integers), self._range.clip,
            )  # fmt: skip
        if std:
            key = _noise_key(self._noise_seed, round, client)
            integers = integers + discrete_gaussian(len(integers), std, key)
        weight = min(update.num_examples, self._agreed.largest_weight)
        data = self._machines[client].mask(self._shares[client], integers, weight, loss)
        schema = schema_of({name: update.update[name] for name in names})
        found = self._range.state(integers, schema)
        summed = {n: found[n].to(t.device) for n, t in update.update.items()}
        size = PayloadSize(HEADER_BYTES, len(data) - HEADER_BYTES)
        return Sealed(dataclasses.replace(update, update=summed), Payload(data), size)

    @property
    def _noise_std(self) -> float:
        assert self._agreed is not None
        return noise_std(self._args, self._agreed.threshold, self._agreed.numel)


def _noise_key(seed: int | None, round: int, client: int) -> bytes:
    """Of a client's noise in a round: one that nobody knows, or that of a seed."""
    if seed is None:
        return os.urandom(KEY_BYTES)
    return hashlib.sha256(f"share of the noise|{seed}|{round}|{client}".encode()).digest()


def names_of(names: Sequence[str]) -> list[str]:
    """The order in which an update's tensors are summed: nothing depends on an end's own."""
    return sorted(names)
