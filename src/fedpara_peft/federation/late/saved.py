"""Turns that have not ended, as a checkpoint has them: tensors, and all else as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ...comm.payload import PayloadSize
from ...comm.state import State
from ..state import ClientState, ClientUpdate, Flight, LocalSteps, Outcome, Refused

#: Parts of a turn that are groups of states, and not one.
_GROUPS = ("extra", "strategy", "optimizer")


def flights_to_saved(flights: Sequence[Flight]) -> tuple[list[dict[str, Any]], dict[str, State]]:
    """Turns as JSON has them, and their tensors by group.

    An exception that a client met is left out: what was said of it stays.
    """
    rows: list[dict[str, Any]] = []
    groups: dict[str, State] = {}
    for flight in flights:
        update = None if flight.outcome is None else flight.outcome.update
        parts: dict[str, State] = {}
        if update is not None:
            parts |= {"update": update.update, "buffers": update.buffers}
            parts |= {f"extra.{name}": state for name, state in update.extra.items()}
        if (kept := flight.state) is not None:
            parts |= {"local": kept.local, "residual": kept.residual}
            parts |= {f"strategy.{name}": state for name, state in kept.strategy.items()}
            parts |= {f"optimizer.{name}": state for name, state in kept.optimizer.items()}
        groups |= {f"{flight.client}.{part}": state for part, state in parts.items()}
        rows.append(
            {
                "client": flight.client,
                "start": flight.start,
                "finish_s": flight.finish_s,
                "outcome": None if flight.outcome is None else _outcome_row(flight.outcome),
                "parts": sorted(parts),
            }
        )
    return rows, groups


def flights_from_saved(
    rows: Sequence[Mapping[str, Any]], groups: Mapping[str, State]
) -> tuple[Flight, ...]:
    """The inverse of :func:`flights_to_saved`."""
    return tuple(_flight(row, groups) for row in rows)


def _outcome_row(outcome: Outcome) -> dict[str, Any]:
    size, update, refused = outcome.size, outcome.update, outcome.refused
    return {
        "size": None if size is None else [size.header_bytes, size.tensor_bytes],
        "update": None
        if update is None
        else {
            "num_examples": update.num_examples,
            "train_loss": update.train_loss,
            "steps": None if update.steps is None else dataclasses.astuple(update.steps),
            "terms": update.terms,
        },
        "refused": None if refused is None else [refused.reason, refused.message],
        "keeps_state": outcome.keeps_state,
        "seconds": outcome.seconds,
        "reported": outcome.reported,
        "steps": outcome.steps,
        "terms": outcome.terms,
    }


def _flight(row: Mapping[str, Any], groups: Mapping[str, State]) -> Flight:
    client = row["client"]
    # An empty state has no tensor, and so no group in the file.
    parts = {part: groups.get(f"{client}.{part}", {}) for part in row["parts"]}
    under = {
        group: {
            part.removeprefix(f"{group}."): state
            for part, state in parts.items()
            if part.startswith(f"{group}.")
        }
        for group in _GROUPS
    }
    state = None
    if "local" in parts:
        state = ClientState(
            parts["local"], under["strategy"], parts["residual"], under["optimizer"]
        )
    found = row["outcome"]
    if found is None:
        return Flight(client, row["start"], row["finish_s"], None, state)
    update, sent, refused = None, found["update"], found["refused"]
    if sent is not None:
        steps = None if sent["steps"] is None else LocalSteps(*sent["steps"])
        update = ClientUpdate(
            client, sent["num_examples"], parts["update"], sent["train_loss"], under["extra"],
            parts["buffers"], steps, terms=sent.get("terms"),
        )  # fmt: skip
    outcome = Outcome(
        client,
        None if found["size"] is None else PayloadSize(*found["size"]),
        update,
        None if refused is None else Refused(client, *refused),
        found["keeps_state"],
        found["seconds"],
        reported=found["reported"],
        steps=found["steps"],
        terms=found["terms"],
    )
    return Flight(client, row["start"], row["finish_s"], outcome, state)
