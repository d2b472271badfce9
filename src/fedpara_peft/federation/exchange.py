"""Clients' updates between the processes of a run, through Accelerate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from ..comm.schema import Schema, schema_of
from ..comm.state import State, join_groups, split_groups
from .errors import RoundError
from .state import ClientUpdate, Outcome


def everyones(
    accelerator: Accelerator,
    mine: Mapping[int, Outcome],
    failure: Exception | None,
    owners: Mapping[int, int],
) -> Iterator[Outcome]:
    """All processes' clients on every process, in client order, one update at a time.

    Args:
        accelerator: of this process.
        mine: how the clients trained here fared.
        failure: what stopped this process, if anything did; all then stop, so that none waits for
            another for ever.
        owners: process index by client.

    Raises:
        RoundError: another process was stopped.
        Exception: the failure, on the process that met it.
    """
    facts = {c: _without_tensors(outcome) for c, outcome in mine.items()}
    schema = next((schema_of(_joined(o.update)) for o in mine.values() if o.update), None)
    text = f"{type(failure).__name__}: {failure}" if failure else None
    gathered = gather_object([(facts, schema, text)])
    if failure is not None:
        raise failure
    for _, _, stopped in gathered:
        if stopped is not None:
            raise RoundError(f"another process stopped: {stopped}")
    known = {client: fact for part, _, _ in gathered for client, fact in part.items()}
    schema = next((s for _, s, _ in gathered if s is not None), None)
    for client in sorted(owners):
        fact = known[client]
        if fact.update is None or schema is None:
            yield fact
            continue
        own = mine[client].update if client in mine else None
        groups = split_groups(_sent(accelerator, own, schema, owners[client]))
        update = dataclasses.replace(fact.update, update=groups.pop("update", {}), extra=groups)
        yield dataclasses.replace(fact, update=update)


def _sent(accelerator: Accelerator, own: ClientUpdate | None, schema: Schema, owner: int) -> State:
    if own is not None:
        data = _pack(_joined(own), schema)
    else:
        size = sum(entry.num_bytes for entry in schema.values())
        data = torch.empty(size, dtype=torch.uint8, device=accelerator.device)
    return _unpack(broadcast(data, from_process=owner), schema)


def _without_tensors(outcome: Outcome) -> Outcome:
    if outcome.update is None:
        return outcome
    return dataclasses.replace(
        outcome, update=dataclasses.replace(outcome.update, update={}, extra={})
    )


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
