"""Checkpoints of a run: complete or not there at all.

    checkpoint-12/server.safetensors    w_t and what the strategy keeps on the server
    checkpoint-12/trainer_state.json    round, reports of all rounds, settings that must not change
    checkpoint-12/ledger.npy            all transfers so far
    checkpoint-12/…                     the model, as ``save_model`` writes it

Clients' states lie beside the checkpoints, by version (see ``store.py``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_tensors
from torch import nn

from ..comm.ledger import Ledger
from ..comm.schema import digest, schema_of
from ..comm.state import State, join_groups, split_groups
from .arguments import FederatedArguments
from .errors import ResumeError
from .history import History, report_from_json
from .state import ServerState
from .store import sync
from .strategies import Strategy

_FORMAT = 2
_FOLDER = re.compile(r"checkpoint-(\d+)")

#: Arguments that a resumed run may change.
_FREE = {
    "output_dir", "num_rounds", "eval_every", "eval_batch_size", "save_every", "save_total_limit",
    "client_store", "report_to", "disable_tqdm", "report_averaging_bias",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A run between two rounds."""

    server: ServerState
    history: History
    ledger: Ledger


def run_settings(
    args: FederatedArguments, strategy: Strategy, clients: list[int], model: State
) -> dict[str, Any]:
    """What a resumed run must have in common with the interrupted one.

    Args:
        args: the run's settings.
        strategy: the federated optimizer.
        clients: numbers that tell one population from another.
        model: all that is trained, of which names, shapes and dtypes count.
    """
    return {
        **{name: value for name, value in asdict(args).items() if name not in _FREE},
        "strategy": [type(strategy).__name__, {n: repr(v) for n, v in vars(strategy).items()}],
        "clients": clients,
        "model": digest(schema_of(model)),
    }


def placed_like(server: ServerState, like: State) -> ServerState:
    """A server state on the devices of the live tensors."""

    def placed(state: State) -> State:
        return {name: tensor.to(like[name].device) for name, tensor in state.items()}

    optimizer = {group: placed(state) for group, state in server.optimizer.items()}
    # The residual stays in main memory, where payloads are made.
    return replace(server, params=placed(server.params), optimizer=optimizer)


def write_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a model: an adapter folder, a transformers folder, or safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_pretrained = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(folder)
    else:
        save_tensors(model, str(folder / "model.safetensors"))


def checkpoints(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """The complete checkpoints in a folder by round, in order."""
    found = {
        int(match[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := _FOLDER.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def save_checkpoint(
    output_dir: str | os.PathLike[str],
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    save_model: Callable[[str], None],
) -> Path:
    """Write a checkpoint under another name, and rename it when it is whole and on the disk."""
    number = checkpoint.server.round
    final = Path(output_dir) / f"checkpoint-{number}"
    partial = Path(output_dir) / f".checkpoint-{number}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(str(partial))
    server = checkpoint.server
    groups = {"params": server.params, "residual": server.residual}
    groups.update({f"optimizer.{name}": state for name, state in server.optimizer.items()})
    tensors = {n: t.contiguous() for n, t in join_groups(groups).items()}
    save_file(tensors, partial / "server.safetensors")
    state = {
        "format": _FORMAT,
        "round": number,
        "buffers": sorted(server.buffers),
        "noise_seed": server.noise_seed,
        "settings": dict(settings),
        "rounds": [asdict(report) for report in checkpoint.history],
    }
    (partial / "trainer_state.json").write_text(json.dumps(state, indent=1) + "\n")
    checkpoint.ledger.save(partial / "ledger.npy")
    for path in partial.rglob("*"):
        sync(path)
    os.replace(partial, final)
    sync(final.parent)
    return final


def load_checkpoint(folder: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint that was written under the same settings.

    Raises:
        ResumeError: it is not a checkpoint of such a run.
    """
    try:
        found = json.loads((folder / "trainer_state.json").read_text())
        tensors = load_file(folder / "server.safetensors")
        ledger = Ledger.load(folder / "ledger.npy")
    except FileNotFoundError as error:
        raise ResumeError(
            f"{folder} is not a checkpoint ({Path(error.filename).name} is missing): give a folder "
            "checkpoint-<round> that save_every wrote"
        ) from None
    if found["format"] != _FORMAT:
        raise ResumeError(
            f"{folder} has format {found['format']}, this version reads {_FORMAT}: resume with the "
            "version that wrote it"
        )
    asked = json.loads(json.dumps(dict(settings)))
    differing = {
        name: (found["settings"].get(name), asked.get(name))
        for name in sorted(asked.keys() | found["settings"].keys())
        if found["settings"].get(name) != asked.get(name)
    }
    if differing:
        shown = "; ".join(f"{n}: {was!r} then, {now!r} now" for n, (was, now) in differing.items())
        raise ResumeError(
            f"{folder} is of another run ({shown}): resume with the same settings, or start afresh "
            "in another output_dir"
        )
    groups = split_groups(tensors)
    server = ServerState(
        round=found["round"],
        params=groups.pop("params", {}),
        residual=groups.pop("residual", {}),
        optimizer={name.removeprefix("optimizer."): state for name, state in groups.items()},
        buffers=frozenset(found["buffers"]),
        noise_seed=found["noise_seed"],
    )
    return Checkpoint(server, History(tuple(map(report_from_json, found["rounds"]))), ledger)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: under its name it is whole until it is gone."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.replace(folder, partial)
    shutil.rmtree(partial)


def remove_partial(output_dir: str | os.PathLike[str]) -> None:
    """Remove what a killed run left unfinished."""
    for path in Path(output_dir).glob(".checkpoint-*.partial"):
        shutil.rmtree(path)
