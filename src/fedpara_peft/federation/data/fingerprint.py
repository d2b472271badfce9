"""Short names of what a run was given: to compare processes, nodes, a run and its checkpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...comm.schema import digest as schema_digest
from ...comm.schema import schema_of
from ...comm.state import State
from ..arguments import FederatedArguments
from ..random import derived_seed, seeded
from ..strategies import Strategy

#: How many clients' data are looked at, and how many entries of a large tensor.
_CLIENTS, _ENTRIES = 4, 4096
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def settings_facts(args: FederatedArguments, strategy: Strategy) -> dict[str, Any]:
    """Arguments and strategy, by name."""
    own = {name: _ADDRESS.sub("", repr(value)) for name, value in sorted(vars(strategy).items())}
    return {
        **args.described(),
        "rounds of the schedule": args.schedule_rounds,
        "strategy": [type(strategy).__name__, own],
    }


def model_facts(state: State) -> dict[str, Any]:
    """All that is trained: names, shapes and dtypes."""
    return {"model": schema_digest(schema_of(state))}


def base_facts(model: nn.Module, state: State) -> dict[str, Any]:
    """What of a model is not trained and must be the same wherever it trains: a frozen base."""
    tensors = {n: t.detach() for n, t in model.named_parameters() if n not in state}
    return {"frozen base": _short(f"{n} {tensor_digest(t)}" for n, t in sorted(tensors.items()))}


def population_facts(
    names: Sequence[Any], num_examples: Sequence[int], datasets: Sequence[Any] | None
) -> dict[str, Any]:
    """Who the clients are, in their order, and what their data look like.

    Args:
        names: their names.
        num_examples: their sizes.
        datasets: their data sets; None where they are elsewhere.
    """
    return {
        "number of clients": len(names),
        "number of examples": sum(num_examples),
        "clients' names": shown_values(names),
        "clients' sizes": shown_values(num_examples),
        "clients' data": None if datasets is None else data_digest(datasets),
    }


def shown_values(values: Sequence[Any]) -> str:
    """A few values for people, and a digest of all."""
    few = ", ".join(f"{value!r:.20}" for value in values[:3])
    return f"{few}{', …' if len(values) > 3 else ''} ({_short(map(repr, values))})"


def data_digest(datasets: Sequence[Any]) -> str:
    """A digest of a few rows of a few data sets.

    Rows are read as training reads them, transforms included, under a fixed seed, and twice: a row
    that is not the same twice says nothing and is left out.
    """
    step = max(1, -(-len(datasets) // _CLIENTS))
    parts = []
    for client in range(0, len(datasets), step):
        data = datasets[client]
        for position in sorted({0, len(data) // 2, len(data) - 1}):
            one, again = (_row_digest(data, position) for _ in range(2))
            parts.append(one if one == again else "changing")
    return _short(parts)


def tensor_digest(tensor: Tensor) -> str:
    """A digest of a tensor's entries: of all, or of its ends, and its sum if it is large.

    The sum is of the entries' bits, as integers, so that it does not depend on the order: on how
    many threads there are, or on the device. Of a tensor on ``meta`` the shape is all there is, and
    of one that is made of others (quantized) those are taken.
    """
    tensor = tensor.detach()
    if tensor.is_meta:
        return _short([f"{tuple(tensor.shape)} {tensor.dtype}"])
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return _short(f"{name} {tensor_digest(getattr(tensor, name))}" for name in names)
    flat = tensor.reshape(-1).contiguous()
    if flat.numel() <= 2 * _ENTRIES:
        return _short([_bytes_of(flat)])
    bits = flat.view(torch.uint8).view(_INTEGERS[min(flat.element_size(), 8)])
    ends = torch.cat([flat[:_ENTRIES], flat[-_ENTRIES:]])
    return _short([_bytes_of(ends), str(bits.sum(dtype=torch.int64).item())])


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs, by name; a mapping inside is compared entry by entry."""
    found = {}
    for name in sorted(then.keys() | now.keys()):
        a, b = then.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.update({f"{name}: {n}": pair for n, pair in differences(a, b).items()})
        elif a != b:
            found[name] = a, b
    return found


def shown_differences(differing: Mapping[str, tuple[Any, Any]], one: str, other: str) -> str:
    """Differences as text: ``learning_rate: 0.1 then, 0.2 now``."""
    shown = [f"{n}: {a!r:.80} {one}, {b!r:.80} {other}" for n, (a, b) in differing.items()]
    more = f"; and {len(shown) - 5} more" if len(shown) > 5 else ""
    return "; ".join(shown[:5]) + more


def _row_digest(data: Any, position: int) -> str:
    with seeded(derived_seed(0, "fingerprint")):
        try:
            return _short(_parts(data[position]))
        except Exception as error:  # its client will meet it, and be told
            return f"unreadable: {type(error).__name__}"


def _parts(value: Any) -> Iterable[str | bytes]:
    """A row's contents, whatever it is made of; of unknown objects their type."""
    yield type(value).__name__
    if isinstance(value, Tensor):
        yield f"{tuple(value.shape)} {value.dtype}"
        yield _bytes_of(value.detach().cpu().reshape(-1))
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{np.shape(value)} {value.dtype}"
        yield np.ascontiguousarray(value).tobytes()
    elif value is None or isinstance(value, str | bytes | bool | int | float | complex):
        yield repr(value)
    elif isinstance(value, Mapping):
        for key in value:
            yield repr(key)
            yield from _parts(value[key])
    elif isinstance(value, Sequence):
        for item in value:
            yield from _parts(item)
    elif hasattr(value, "__array_interface__"):  # an image
        yield from _parts(np.asarray(value))


def _bytes_of(flat: Tensor) -> bytes:
    return bytes(flat.contiguous().view(torch.uint8).cpu().numpy())


def _short(parts: Iterable[str | bytes]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()
