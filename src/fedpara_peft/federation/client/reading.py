"""How clients read their data in a round: the same rows and draws in every engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..arguments import FederatedArguments
from ..data.batches import Collator, LastBatch, batches
from ..data.normalization import normalizes_batches
from ..random import derived_seed, torch_generator


class Reading:
    """A client's batches, and the seed of what is drawn as it trains.

    Args:
        args: the run's settings.
        model: whose batch norms, if any, cannot have batches of one row.
        collator: makes a batch from rows.

    Attributes:
        collator: as given.
    """

    def __init__(
        self, args: FederatedArguments, model: nn.Module, collator: Collator | None
    ) -> None:
        self._args, self._model = args, model
        self.collator = collator

    def seed(self, client: int, round: int) -> int:
        """Of the global generators, from which dropout, transforms and collators draw."""
        return derived_seed(self._args.seed, round, client, "training")

    def epoch(
        self, client: int, round: int, dataset: Any, number: int
    ) -> Iterator[tuple[Any, int]]:
        """The batches of an epoch in its own order, and of how many rows each is.

        Args:
            client: client index.
            round: rounds completed.
            dataset: the client's examples.
            number: the epoch's, in the round.
        """
        args = self._args
        order = torch_generator(args.seed, round, client, f"batches {number}")
        return batches(dataset, args.per_client_batch_size, self.collator, order, self.last_batch())

    def last_batch(self) -> LastBatch:
        """What becomes of a last batch that is not full, with the model in training mode."""
        if self._args.drop_last:
            return "drop"
        return "merge" if normalizes_batches(self._model) else "keep"
