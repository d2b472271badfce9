"""Safetensors files tensor by tensor: no more of a file is in memory than one layer of it.

A file is eight bytes with the header's length, the header (JSON) and the tensors' bytes. Reading
seeks (a mapped file would count as memory of this process); writing collects the tensors in a file
beside the target, for the header that comes first names the size of each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import ConversionError, LayoutError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 1 << 22
#: What the hashes stand as until the bytes that they are of have been written.
_HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
_SPEC_HASH = "modelspec.hash_sha256"
#: Metadata that is of a file's very bytes. The last is written anew wherever it was.
HASH_KEYS = tuple(_HASHES)
#: The bytes that the older of the two hashes is of.
_LEGACY_START, _LEGACY_SIZE = 0x100000, 0x10000


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_values(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file, read tensor by tensor.

    Args:
        path: the file.

    Raises:
        LayoutError: it is no safetensors file, is cut off, or has a key twice.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, "pt"):  # its own checks: lengths, offsets, shapes
                pass
        except (SafetensorError, OSError) as error:
            raise LayoutError(f"{path} cannot be read ({error}): save or fetch it again") from None
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=self._without_twins)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: dict[str, TensorInfo] = {}
        for key, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise LayoutError(
                    f"{key} in {self.path} is {entry['dtype']}, which torch has no dtype for: "
                    "save it in another one"
                )
            start, end = entry["data_offsets"]
            self.tensors[key] = TensorInfo(
                _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + start, end - start
            )
        self._file = self.path.open("rb")

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        info = self.tensors[key]
        data = bytearray(info.num_bytes)
        self._file.seek(info.start)
        if self._file.readinto(data) != info.num_bytes:  # cut off since it was opened
            raise LayoutError(f"{self.path} ends before {key} does: save or fetch it again")
        if not data:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(data, dtype=info.dtype).view(info.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _without_twins(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise LayoutError(f"{self.path} has {key} twice: save or fetch it again")
            found[key] = value
        return found


class TensorWriter:
    """Writes a safetensors file tensor by tensor; the file appears when all of it is there.

    Args:
        path: the file to write. Its folder is made when it is finished.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Beside the target, so that it has the space that the target needs.
        folder = next(p for p in self.path.absolute().parents if p.is_dir())
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.tensors: dict[str, TensorInfo] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Write one tensor; raises :class:`LayoutError` for a key that is there already."""
        if key in self.tensors:
            raise LayoutError(
                f"{self.path} would have {key} twice: two layers of the source are one there"
            )
        if tensor.is_meta:
            raise ConversionError(
                "the adapter is on the meta device, which holds no values: load one"
            )
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        info = TensorInfo(tensor.dtype, tuple(tensor.shape), self._spool.tell(), data.nbytes)
        self._spool.write(data)
        self.tensors[key] = info

    def finish(self, metadata: Mapping[str, str], *, hashes: bool = False) -> None:
        """Write header and tensors, in safetensors' own order, and put the file in its place.

        Args:
            metadata: the file's metadata.
            hashes: add the two hashes by which web interfaces know a file again (that of the
                tensors' bytes, and the older one of 64 KiB at the first MiB of the file as it is
                with the ``ss_`` metadata alone).
        """
        order = sorted(self.tensors, key=lambda k: (-self.tensors[k].dtype.itemsize, k))
        metadata = {k: v for k, v in metadata.items() if k not in _HASHES}
        training = {k: v for k, v in metadata.items() if k.startswith("ss_")}
        if hashes:
            metadata.update(_HASHES)
        if _SPEC_HASH in metadata:
            metadata[_SPEC_HASH] = "0x" + "0" * 64
        header = self._header(order, metadata or None)
        skipped = _LEGACY_START - len(self._header(order, training))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            with partial.open("wb") as out:
                out.write(header)
                found = self._copy(order, out, skipped)
                if hashes:
                    metadata.update(found)
                if _SPEC_HASH in metadata:
                    metadata[_SPEC_HASH] = "0x" + found["sshs_model_hash"]
                out.seek(0)
                out.write(self._header(order, metadata or None))
            os.replace(partial, self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Give up what was collected; what was finished stays."""
        self._spool.close()

    def _header(self, order: list[str], metadata: Mapping[str, str] | None) -> bytes:
        entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        start = 0
        for key in order:
            info = self.tensors[key]
            end = start + info.num_bytes
            entries[key] = {
                "dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": [start, end],
            }  # fmt: skip
            start = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
        return len(text).to_bytes(8, "little") + text

    def _copy(self, order: list[str], out: BinaryIO, skipped: int) -> dict[str, str]:
        """Copy the tensors behind the header; the hashes of their bytes."""
        whole, legacy, position = hashlib.sha256(), hashlib.sha256(), 0
        for key in order:
            info = self.tensors[key]
            self._spool.seek(info.start)
            left = info.num_bytes
            while left:
                part = self._spool.read(min(left, _CHUNK))
                out.write(part)
                whole.update(part)
                first, last = skipped - position, skipped + _LEGACY_SIZE - position
                legacy.update(part[max(first, 0) : max(last, 0)])
                left -= len(part)
                position += len(part)
        return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}
