"""Checkpoints of a run: complete or not there at all.

    checkpoint-12/server.safetensors    w_t, what the strategy keeps, new clients' local tensors
    checkpoint-12/trainer_state.json    round, reports of all rounds, settings that must not change
    checkpoint-12/flights.safetensors   what clients that are still at work will send and keep
    checkpoint-12/ledger.npy            all transfers so far
    checkpoint-12/…                     the model, as ``save_model`` writes it
    checkpoint-12/manifest.json         a digest of each of these files

Clients' states lie beside the checkpoints, by version (see ``store.py``); a checkpoint names those
that it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...comm.ledger import Ledger
from ...comm.state import State, join_groups, save_tensors, split_groups
from ..data.fingerprint import differences, shown_differences
from ..errors import ResumeError, RunFolderError
from ..late.saved import flights_from_saved, flights_to_saved
from ..state import Remainders, ServerState, Terms
from .history import History, report_from_json, report_to_json
from .store import CLIENTS, kept_files, sync

_FORMAT = 4
_MANIFEST, _FLIGHTS = "manifest.json", "flights.safetensors"
_FOLDER = re.compile(r"checkpoint-(\d+)")

#: Arguments that a resumed run may change.
_FREE = {
    "output_dir", "num_rounds", "eval_every", "eval_batch_size", "save_every", "save_total_limit",
    "client_store", "report_to", "disable_tqdm", "report_averaging_bias", "on_client_error",
    "overwrite_output_dir", "metric_for_best_model", "greater_is_better",
    "load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold",
    "secure_drop_outs", "unmask_drop_out_probability",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A run between two rounds.

    Attributes:
        server: after the round.
        history: of all rounds.
        ledger: their transfers.
        first_local: the local tensors of a client that never trained: those of the model as it was
            built, which a script without a seed builds otherwise next time.
    """

    server: ServerState
    history: History
    ledger: Ledger
    first_local: State


def must_agree(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a run was given, what a resumed run must have in common with the interrupted one."""
    return {name: value for name, value in facts.items() if name not in _FREE}


def write_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a model: an adapter folder, a transformers folder, or safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_pretrained = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(folder)
    else:
        save_tensors(model, folder / "model.safetensors")


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
    facts: Mapping[str, Any],
    save_model: Callable[[str], None],
) -> Path:
    """Write a checkpoint under another name, and rename it when it is whole and on the disk.

    One of the same round is replaced.

    Raises:
        RunFolderError: it cannot be written; nothing of it is left.
    """
    number = checkpoint.server.round
    final = Path(output_dir) / f"checkpoint-{number}"
    partial = _partial(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(partial, checkpoint, facts, save_model)
        if final.exists():  # of the same round, with a report that said less
            os.replace(final, _replaced(final))
        os.replace(partial, final)
        shutil.rmtree(_replaced(final), ignore_errors=True)
        sync(final.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        restore_replaced(output_dir)
        last = list(checkpoints(output_dir).values())
        go_on = f"resumes from {last[-1]}" if last else "has no checkpoint to resume from yet"
        raise RunFolderError(
            f"{final} could not be written ({error.strerror or error}): make room, then run again "
            f"with train(resume_from_checkpoint=True), which {go_on}"
        ) from error
    return final


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    facts: Mapping[str, Any],
    save_model: Callable[[str], None],
) -> None:
    save_model(str(folder))
    server = checkpoint.server
    groups = {
        "params": server.params, "residual": server.residual, "first_local": checkpoint.first_local
    }  # fmt: skip
    groups.update({f"optimizer.{name}": state for name, state in server.optimizer.items()})
    rest = server.remainders
    for terms in rest.terms:
        groups |= {f"terms.{terms.round}.{k}": state for k, state in enumerate(terms.states)}
    flights, waiting = flights_to_saved(server.flights)
    try:
        save_file(join_groups(groups), folder / "server.safetensors")
        if flights:
            save_file(join_groups(waiting), folder / _FLIGHTS)
    except SafetensorError as error:  # it says so of a full disk, too
        raise OSError(str(error)) from error
    state = {
        "format": _FORMAT,
        "round": server.round,
        "buffers": sorted(server.buffers),
        "noise_seed": server.noise_seed,
        "remainders": {
            "names": sorted(rest.names),
            "weights": {terms.round: terms.weights for terms in rest.terms},
            "seen": [*map(list, rest.seen.items())],
            "complete_from": rest.complete_from,
        },
        "clock_s": server.clock_s,
        "flights": flights,
        "clip_norm": server.clip_norm,
        CLIENTS: kept_files(folder.parent / CLIENTS, server.round),
        "settings": must_agree(facts),
        "rounds": [report_to_json(report) for report in checkpoint.history],
    }
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=1) + "\n")
    checkpoint.ledger.save(folder / "ledger.npy")
    digests = {
        path.relative_to(folder).as_posix(): _file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / _MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")
    for path in folder.rglob("*"):
        sync(path)


def load_checkpoint(folder: Path, facts: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint that was written under the same settings.

    Raises:
        ResumeError: it is not a checkpoint of such a run, or it is damaged.
    """
    found = _state_of(folder)
    asked = json.loads(json.dumps(must_agree(facts)))
    if differing := differences(found["settings"], asked):
        shown = shown_differences(differing, "then", "now")
        raise ResumeError(
            f"{folder} is of another run ({shown}): resume with the same settings, clients and "
            "model, or start afresh in another output_dir"
        )
    try:
        groups = split_groups(load_file(folder / "server.safetensors"))
        at_work = found["flights"]
        waiting = split_groups(load_file(folder / _FLIGHTS)) if at_work else {}
        ledger = Ledger.load(folder / "ledger.npy")
        history = History(tuple(map(report_from_json, found["rounds"])))
        rest = _remainders(found.get("remainders"), groups)
        first_local = groups.pop("first_local", {})
        server = ServerState(
            round=found["round"],
            params=groups.pop("params", {}),
            residual=groups.pop("residual", {}),
            optimizer={name.removeprefix("optimizer."): state for name, state in groups.items()},
            buffers=frozenset(found["buffers"]),
            noise_seed=found["noise_seed"],
            remainders=rest,
            clock_s=found["clock_s"],
            flights=flights_from_saved(at_work, waiting),
            clip_norm=found["clip_norm"],
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    return Checkpoint(server, history, ledger, first_local)


def _remainders(found: Mapping[str, Any] | None, groups: dict[str, State]) -> Remainders:
    """What is kept of the remainders; their terms are taken out of the groups."""
    if found is None:
        return Remainders()
    terms = tuple(
        Terms(int(n), tuple(w), tuple(groups.pop(f"terms.{n}.{k}") for k in range(len(w))))
        for n, w in found["weights"].items()
    )
    seen = dict(map(tuple, found["seen"]))
    return Remainders(frozenset(found["names"]), terms, seen, found["complete_from"])


def _state_of(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``trainer_state.json``, once all files are seen to be those written."""
    try:
        found = json.loads((folder / "trainer_state.json").read_text())
        if found["format"] != _FORMAT:
            raise ResumeError(
                f"{folder} has format {found['format']}, this version reads {_FORMAT}: resume with "
                "the version that wrote it"
            )
        digests = json.loads((folder / _MANIFEST).read_text())
        for name, digest in digests.items():
            if _file_digest(folder / name) != digest:
                raise _damaged(folder, f"{name} is not what was written")
        for name in found.get(CLIENTS, ()):
            if not (folder.parent / CLIENTS / name).is_file():
                raise _damaged(folder, f"{CLIENTS}/{name} is missing")
    except FileNotFoundError as error:
        name = Path(error.filename).name
        if name in ("trainer_state.json", _MANIFEST):
            raise ResumeError(
                f"{folder} is not a checkpoint ({name} is missing): give a folder "
                "checkpoint-<round> that save_every wrote"
            ) from None
        raise _damaged(folder, f"{name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    return found


def _damaged(folder: Path, what: str) -> ResumeError:
    match = _FOLDER.fullmatch(folder.name)
    number = int(match[1]) if match else 0
    before = [path for n, path in checkpoints(folder.parent).items() if n < number]
    remedy = (
        f"continue from the one before, train(resume_from_checkpoint={str(before[-1])!r})"
        if before
        else "there is none before it: start afresh in another output_dir"
    )
    return ResumeError(f"{folder} is damaged ({what}): {remedy}")


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: under its name it is whole until it is gone."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    os.replace(folder, partial)
    shutil.rmtree(partial)


def restore_replaced(output_dir: str | os.PathLike[str]) -> None:
    """Put back a checkpoint that was about to be replaced by another, if that did not come."""
    for path in Path(output_dir).glob(".checkpoint-*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if final.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, final)


def remove_partial(output_dir: str | os.PathLike[str]) -> None:
    """Remove what a killed run left unfinished."""
    for path in Path(output_dir).glob(".checkpoint-*.partial"):
        shutil.rmtree(path)
