"""A stack's batches: each client's own, in its own order, rows of one client after the other's."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...arguments import FederatedArguments
from ...data.batches import LastBatch, batch_sizes, count_rows, tensors_of
from ...random import Generators, preserved, reseed
from ..reading import Reading
from ..steps import in_a_round


class OneByOneError(Exception):
    """These clients go one after the other this time: their data are bad, or their ways differ."""


def likeness_of(dataset: Any, args: FederatedArguments, last: LastBatch) -> Any:
    """What clients of one stack have in common: the rows of every step, and their shapes if known.

    Raises:
        ClientDataError: it is no data set whose rows can be counted.
    """
    sizes = batch_sizes(count_rows(dataset), args.per_client_batch_size, last)
    steps = tuple(in_a_round(lambda _: sizes, args)) if sizes else ()
    tensors = tensors_of(dataset)
    if tensors is None:
        return steps, None
    return steps, tuple((t.shape[1:], t.dtype, t.device) for t in tensors[0])


class Batches:
    """The batches of a round of clients that are alike (:func:`likeness_of`).

    Args:
        clients: their indices.
        datasets: theirs.
        round: rounds completed.
        args: the run's settings.
        reading: how they read their data.
        device: whose generator counts beside the CPU's.
    """

    def __init__(
        self,
        clients: Sequence[int],
        datasets: Sequence[Any],
        round: int,
        args: FederatedArguments,
        reading: Reading,
        device: torch.device,
    ) -> None:
        self._clients = list(zip(clients, datasets, strict=True))
        self._round, self._args, self._reading, self._device = round, args, reading, device
        #: Whether reading rows runs nobody's code.
        self._indexed = reading.collator is None and tensors_of(datasets[0]) is not None
        #: Where the clients' streams of randomness are, which collators and transforms draw from.
        self._streams: dict[int, Generators] = {}

    def __iter__(self) -> Iterator[tuple[list[Any], int]]:
        """For every step the clients' batches, and the rows of each."""
        each = [
            in_a_round(functools.partial(self._epoch, client, dataset), self._args)
            for client, dataset in self._clients
        ]
        for parts in zip(*each, strict=True):
            yield [batch for batch, _ in parts], parts[0][1]

    def _epoch(self, client: int, dataset: Any, epoch: int) -> Iterable[tuple[Any, int]]:
        found = self._reading.epoch(client, self._round, dataset, epoch)
        if self._indexed:
            return found
        with self._stream(client):
            try:
                return list(found)
            except Exception as error:  # which comes again, and is then said of its client
                raise OneByOneError from error

    @contextmanager
    def _stream(self, client: int) -> Iterator[None]:
        with preserved(self._device):
            if client in self._streams:
                self._streams[client].put_back(self._device)
            else:
                reseed(self._reading.seed(client, self._round), self._device)
            yield
            self._streams[client] = Generators.now(self._device)


def joined(parts: Sequence[Any]) -> Any:
    """Batches one after the other: of tuples a tuple, of mappings a dict.

    Raises:
        RuntimeError: they hold more than tensors, or tensors of several shapes.
    """
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: _rows([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_rows(list(column)) for column in zip(*parts, strict=True))
    return _rows(parts)


def _rows(tensors: Sequence[Any]) -> Tensor:
    shapes = {(t.shape, t.dtype) if isinstance(t, Tensor) and t.dim() else None for t in tensors}
    if None in shapes:
        raise RuntimeError("a batch holds more than tensors of rows")
    if len(shapes) > 1:
        raise RuntimeError("the clients' batches have several shapes (pad rows to one length)")
    return torch.cat(list(tensors))
