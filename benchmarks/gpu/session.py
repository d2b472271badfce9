"""What a part measures with: the device, the clock, and rows that are written at once."""

from __future__ import annotations

import contextlib
import gc
import platform
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rows
import torch

import fedpara_peft

#: A measurement: the table it goes to, what makes it, and its case, the arguments of that.
Measurement = tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]

PACKAGES = (
    "torch", "triton", "peft", "transformers", "accelerate", "lycoris-lora", "datasets",
)  # fmt: skip

#: How float32 and bfloat16 are meant: the base model's dtype, and the adapter's.
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "bf16 all": (torch.bfloat16, torch.bfloat16),
}


class Session:
    """One part's run.

    Args:
        part: its name.
        device: ``cuda`` or ``cpu``.
        smoke: whether everything shall be small and short.
        out: folder of ``rows.jsonl``.
        seconds: after which no measurement begins.
    """

    def __init__(self, part: str, device: str, smoke: bool, out: Path, seconds: float) -> None:
        self.part, self.device, self.smoke, self.out = part, device, smoke, out
        self._end = time.monotonic() + seconds
        self.failures = 0
        self.add("environment", **environment(part, device, smoke))

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def add(self, table: str, **values: Any) -> None:
        """Write a row."""
        row = {"part": self.part, "table": table, **values}
        rows.append(self.out, row)
        if table != "environment":
            print(str(row)[:240], flush=True)

    def fail(self, table: str, what: dict[str, Any], error: BaseException) -> None:
        """Note that something failed; the part goes on, and ends with an error."""
        self.failures += 1
        traceback.print_exception(error)
        first = str(error).strip().partition("\n")[0]
        self.add("error", of=table, case=what, error=f"{type(error).__name__}: {first:.300}")

    def each(self, measurements: Iterable[Measurement], collect: int = 1) -> None:
        """Make measurements until the time is over; one that fails is noted.

        Args:
            measurements: in order.
            collect: after how many of them memory is given back.
        """
        todo = list(measurements)
        gc.freeze()  # what is imported need not be looked through every time
        for done, (table, measure, case) in enumerate(todo):
            if self.left <= 0:
                self.add("cut", done=done, of=len(todo))
                return
            try:
                self.add(table, **case, **measure(self, **case))
            except Exception as error:
                self.fail(table, case, error)
                if "CUDA error" in str(error) or "device-side assert" in str(error):
                    raise  # nothing works in this process after it
            if done % collect == 0:
                gc.collect()
                if self.device == "cuda":
                    torch.cuda.empty_cache()


@contextlib.contextmanager
def products_in(name: str) -> Iterator[None]:
    """float32 products as they are, or in tf32 where the name says so; back to the defaults."""
    fast = name == "tf32"
    with warnings.catch_warnings():
        # The newer switches, which it names, make torch.compile of the same release refuse.
        warnings.filterwarnings("ignore", ".*TF32.*", UserWarning)
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


def environment(part: str, device: str, smoke: bool) -> dict[str, Any]:
    """Machine, versions and command."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "command": f"python3 benchmarks/gpu/run.py --parts {part}"
        + " --smoke" * smoke
        + f" --device {device}" * (device != "cuda"),
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "fedpara-peft": fedpara_peft.__version__,
        **packages,
    }
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _driver() -> str | None:
    """The driver's version, None where nvidia-smi is missing or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return said.stdout.strip().partition("\n")[0] or None


def peers_module() -> Any:
    """LyCORIS's LoHa, None where it is not installed."""
    try:
        from lycoris.modules import loha
    except ModuleNotFoundError as error:
        print(f"LyCORIS is left out: {error}", file=sys.stderr)
        return None
    return loha
