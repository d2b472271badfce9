"""Where clients' states rest between their rounds: in memory or on disk, by version.

A version is the number of rounds completed when the client had trained. Versions let a resumed run
take back whatever a client learnt after the checkpoint. On disk a client is known by its name, so
that nobody gets another's state, and every file carries a digest of what is in it.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...comm.state import State, join_groups, split_groups
from ..errors import ResumeError
from ..state import ClientState

#: The folder of a run in which its clients' states lie.
CLIENTS = "clients"
_FILE = re.compile(r"client-(.+)\.round-(\d+)\.safetensors")
_PLAIN = re.compile(r"[a-z_][a-z0-9_-]*")


def file_key(name: Any) -> str:
    """A client's name as part of a file's name; no two names have the same.

    Lower-case words stay as they are, and so do numbers. Others (with capitals, which some file
    systems do not tell apart, or of other characters) get a digest.
    """
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        return str(name)
    if isinstance(name, str) and _PLAIN.fullmatch(name) and len(name) <= 64:
        return name
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", str(name))[:48]
    return f"{slug}.{hashlib.blake2b(repr(name).encode(), digest_size=6).hexdigest()}"


def kept_files(folder: Path, version: int) -> list[str]:
    """Names of a store's files that hold what clients keep at a version.

    Args:
        folder: the store's.
        version: rounds completed.
    """
    newest: dict[str, int] = {}
    for key, number in _stored(folder):
        if number <= version:
            newest[key] = max(number, newest.get(key, 0))
    return sorted(_file_name(key, number) for key, number in newest.items())


def _stored(folder: Path) -> Iterator[tuple[str, int]]:
    """A client's key and a version, of every file of a store."""
    for path in folder.glob("client-*"):
        if match := _FILE.fullmatch(path.name):
            yield match[1], int(match[2])


def _file_name(key: str, version: int) -> str:
    return f"client-{key}.round-{version}.safetensors"


class ClientStore(ABC):
    """States of clients; a client that never trained has none."""

    def __init__(self) -> None:
        self._versions: dict[int, list[int]] = {}

    def get(self, client: int, at: int | None = None) -> ClientState | None:
        """A client's newest state, or the newest up to a version that is kept."""
        versions = self._versions.get(client, [])
        end = len(versions) if at is None else bisect.bisect_right(versions, at)
        return self._read(client, versions[end - 1]) if end else None

    def put(self, client: int, version: int, state: ClientState) -> None:
        """Keep a client's new state beside its former ones."""
        self._write(client, version, state)
        self.note(client, version)

    def note(self, client: int, version: int) -> None:
        """Know of a version that another process put into the same folder."""
        versions = self._versions.setdefault(client, [])
        if version not in versions:
            bisect.insort(versions, version)

    def has(self, client: int, version: int) -> bool:
        """Whether this version of a client's state is kept."""
        return version in self._versions.get(client, ())

    def rollback(self, version: int, *, owner: bool = True) -> None:
        """Forget what clients learnt after a version; only the owner deletes."""
        for client, versions in list(self._versions.items()):
            kept = bisect.bisect_right(versions, version)
            self._forget(client, versions[kept:], owner)
            self._versions[client] = versions[:kept]

    def prune(
        self, needed: Collection[int], clients: Iterable[int] | None = None, *, owner: bool = True
    ) -> None:
        """Forget states that no rollback to one of the needed versions will ask for.

        Args:
            needed: versions to which a rollback may go, the present one among them.
            clients: whose states to look through; everybody's by default.
            owner: whether to delete, too.
        """
        for client in list(self._versions) if clients is None else clients:
            versions = self._versions.get(client, [])
            positions = {bisect.bisect_right(versions, n) - 1 for n in needed}
            kept = [v for i, v in enumerate(versions) if i in positions]
            self._forget(client, [v for v in versions if v not in kept], owner)
            self._versions[client] = kept

    @abstractmethod
    def commit(self) -> None:
        """Make every client's newest state durable."""

    @abstractmethod
    def _read(self, client: int, version: int) -> ClientState: ...

    @abstractmethod
    def _write(self, client: int, version: int, state: ClientState) -> None: ...

    @abstractmethod
    def _delete(self, client: int, version: int) -> None: ...

    def _forget(self, client: int, versions: list[int], owner: bool) -> None:
        for version in versions if owner else ():
            self._delete(client, version)


class DiskStore(ClientStore):
    """A safetensors file per client and version.

    Args:
        folder: the run's own; read if it exists.
        names: of the clients, by index; their indices by default.
    """

    def __init__(self, folder: str | os.PathLike[str], names: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._names = names
        self._unsynced: list[Path] = []
        index = None if names is None else {file_key(name): i for i, name in enumerate(names)}
        for key, version in _stored(self.folder):
            client = index.get(key) if index is not None else _number(key)
            if client is not None:
                self.note(client, version)

    def clear(self) -> None:
        """Forget all clients of a former run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._versions.clear()

    def commit(self) -> None:
        """Flush what was written since the last time to the disk."""
        for path in self._unsynced:
            if path.exists():  # not pruned since
                sync(path)
        self._unsynced.clear()
        if self.folder.is_dir():
            sync(self.folder)

    def _path(self, client: int, version: int) -> Path:
        key = file_key(client if self._names is None else self._names[client])
        return self.folder / _file_name(key, version)

    def _read(self, client: int, version: int) -> ClientState:
        groups = split_groups(_read_checked(self._path(client, version)))
        return ClientState(
            groups.pop("local", {}),
            _under("strategy.", groups),
            groups.pop("residual", {}),
            _under("optimizer.", groups),
            groups.pop("remainders", {}),
        )

    def _write(self, client: int, version: int, state: ClientState) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(client, version)
        partial = path.with_name(f".{path.name}")
        groups = {
            "local": state.local, "residual": state.residual, "remainders": state.remainders
        }  # fmt: skip
        groups.update({f"strategy.{name}": kept for name, kept in state.strategy.items()})
        groups.update({f"optimizer.{part}": kept for part, kept in state.optimizer.items()})
        whole = join_groups(groups)
        save_file(whole, partial, {"digest": _digest(whole)})
        os.replace(partial, path)
        self._unsynced.append(path)

    def _delete(self, client: int, version: int) -> None:
        self._path(client, version).unlink(missing_ok=True)


def _under(prefix: str, groups: Mapping[str, State]) -> dict[str, State]:
    return {n.removeprefix(prefix): state for n, state in groups.items() if n.startswith(prefix)}


def _read_checked(path: Path) -> State:
    """A file's tensors, if they are those that were written."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            agreed = (file.metadata() or {}).get("digest")
    except FileNotFoundError:
        raise ResumeError(f"{path} is gone: restore it, or start afresh") from None
    except SafetensorError as error:
        raise ResumeError(f"{path} is damaged ({error}): restore it, or start afresh") from None
    if agreed != _digest(found):
        raise ResumeError(
            f"{path} is not what was written (its digest differs): restore it, or start afresh"
        )
    return found


def _digest(tensors: State) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


class MemoryStore(ClientStore):
    """Newest states in memory; :meth:`commit` writes those that changed to disk.

    Args:
        disk: where commits go, and where states of an earlier run are read from.
    """

    def __init__(self, disk: DiskStore) -> None:
        super().__init__()
        self._disk = disk
        self._states: dict[tuple[int, int], ClientState] = {}
        self._dirty: set[int] = set()
        self._versions = {client: list(found) for client, found in disk._versions.items()}

    def commit(self) -> None:
        """Write the clients that trained since the last time."""
        for client in sorted(self._dirty):
            if versions := self._versions[client]:  # none after a rollback to its beginning
                self._disk.put(client, versions[-1], self._read(client, versions[-1]))
        self._dirty.clear()
        self._disk.commit()

    def prune(
        self, needed: Collection[int], clients: Iterable[int] | None = None, *, owner: bool = True
    ) -> None:
        """As the class says; states of former checkpoints remain on disk alone."""
        touched = list(self._versions) if clients is None else list(clients)
        super().prune(needed, touched, owner=owner)
        for client in touched:
            for version in self._versions.get(client, [])[:-1]:
                self._states.pop((client, version), None)

    def _read(self, client: int, version: int) -> ClientState:
        if (client, version) not in self._states:
            self._states[client, version] = self._disk._read(client, version)
        return self._states[client, version]

    def _write(self, client: int, version: int, state: ClientState) -> None:
        self._states[client, version] = state
        self._dirty.add(client)

    def _delete(self, client: int, version: int) -> None:
        self._states.pop((client, version), None)
        self._disk._delete(client, version)


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
