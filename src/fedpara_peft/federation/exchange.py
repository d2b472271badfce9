"""Clients' updates between the processes of a run, through Accelerate."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from ..comm.payload import Schema, schema_of
from ..comm.state import State, join_groups, split_groups
from .errors import RoundError
from .state import ClientUpdate


def agree(failure: Exception | None, keeping: Collection[int]) -> list[int]:
    """Tell all processes how this one's clients fared, so that none waits for another for ever.

    Args:
        failure: what a client met here.
        keeping: clients trained here whose state was stored.

    Returns:
        All processes' clients whose state was stored.

    Raises:
        RoundError: a client failed on another process.
        Exception: the failure, on the process that met it.
    """
    gathered = gather_object([(str(failure) if failure else None, list(keeping))])
    if failure is not None:
        raise failure
    for text, _ in gathered:
        if text is not None:
            raise RoundError(text)
    return [client for _, clients in gathered for client in clients]


def everyones(
    accelerator: Accelerator, mine: Mapping[int, ClientUpdate], owners: Mapping[int, int]
) -> Iterator[ClientUpdate]:
    """All processes' updates on every process, in client order, one at a time.

    Args:
        accelerator: of this process.
        mine: the updates made here.
        owners: process index by client.
    """
    facts = {c: (u.num_examples, u.train_loss) for c, u in mine.items()}
    schema = next((schema_of(_joined(u)) for u in mine.values()), None)
    gathered = gather_object([(facts, schema)])
    known = {c: fact for part, _ in gathered for c, fact in part.items()}
    schema = next(s for _, s in gathered if s is not None)
    size = sum(entry.num_bytes for entry in schema.values())
    for client in sorted(owners):
        if client in mine:
            data = _pack(_joined(mine[client]), schema)
        else:
            data = torch.empty(size, dtype=torch.uint8, device=accelerator.device)
        data = broadcast(data, from_process=owners[client])
        groups = split_groups(_unpack(data, schema))
        num_examples, train_loss = known[client]
        yield ClientUpdate(client, num_examples, groups.pop("update", {}), train_loss, groups)


def _joined(update: ClientUpdate) -> State:
    return join_groups({"update": update.update, **update.extra})


def _order(schema: Schema) -> list[str]:
    """Wide dtypes first: every tensor then starts at a multiple of its item's size."""
    return sorted(schema, key=lambda name: (-schema[name].dtype.itemsize, name))


def _pack(state: State, schema: Schema) -> Tensor:
    return torch.cat([state[n].reshape(-1).view(torch.uint8) for n in _order(schema)])


def _unpack(data: Tensor, schema: Schema) -> State:
    names = _order(schema)
    parts = torch.split(data, [schema[n].num_bytes for n in names])
    return {
        n: part.view(schema[n].dtype).view(schema[n].shape)
        for n, part in zip(names, parts, strict=True)
    }
