r"""Every table of a GPU, by one command of at most ten minutes.

    python3 benchmarks/gpu/run.py [--parts adapters cost] [--out FOLDER] [--cifar10 FOLDER]
    python3 benchmarks/gpu/run.py --device cpu --smoke --out /tmp/smoke    # every line, on a CPU

Each part runs in a process of its own and for a time of its own, the most telling first: what hangs
is ended, what fails is told, and neither stops the others. A row is written to ``rows.jsonl`` as
soon as it is measured; a part that is run again replaces its rows. Tables are made of the rows at
the end, or of those that are there with ``--tables``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE.parent / "results" / "gpu"

#: Parts in order, and the share of the time that each may take.
PARTS = {
    "correctness": 130,
    "adapters": 120,
    "cost": 110,
    "from_scratch": 70,
    "clients": 45,
    "compiled": 95,
    "paper": 0,
    "suites": 0,
}
DEFAULT = [name for name, share in PARTS.items() if share]
#: Share of a part that runs only where it is asked for.
_ASKED = 120
#: A part looks at the clock between rows; it is ended this long after its time.
_GRACE_S = 12.0
#: Kept for the tables, which are made last.
_TABLES_S = 8.0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="small and short, all in one process")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and tables")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 in a folder: its cell is trained")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument(
        "--merge", nargs="+", type=Path, default=[], metavar="FOLDER",
        help="take over the parts of other runs, and measure nothing",
    )  # fmt: skip
    parser.add_argument("--part", nargs="+", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.out = options.out.resolve()
    if options.cifar10 is not None:
        options.cifar10 = options.cifar10.resolve()
    if options.parts is None:
        options.parts = [*PARTS] if options.smoke else DEFAULT
        if options.cifar10 and "paper" not in options.parts:
            options.parts = [*options.parts, "paper"]
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts and make the tables; 0 if none of them failed."""
    options = arguments(given)
    if options.part:
        return _inside(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for folder in options.merge:
        rows.merge(folder, options.out)
    if options.tables or options.merge:
        return _make_tables(options.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part ends as well
    # A smoke run pays once for imports, which take longer than its rows.
    groups = [options.parts] if options.smoke else [[part] for part in options.parts]
    shares = [sum(PARTS[part] or _ASKED for part in group) for group in groups]
    commands = [_command(group, options) for group in groups]
    rows.forget(options.out, options.parts)
    (options.out / "log.txt").write_bytes(b"")
    limit = 60 * options.minutes
    failed = run_parts(groups, commands, shares, limit, options.out)
    if _make_tables(options.out):
        failed.append("tables")
    if failed:
        print(f"failed: {', '.join(failed)}; see {options.out / 'log.txt'}", flush=True)
    return int(bool(failed))


def run_parts(
    groups: Sequence[Sequence[str]],
    commands: Sequence[Sequence[str]],
    shares: Sequence[float],
    seconds: float,
    out: Path,
) -> list[str]:
    """Run commands one after the other, each within its share of what time is left.

    Args:
        groups: the parts that a command runs.
        commands: programs; ``{seconds}`` in an argument is how long they may take.
        shares: of the time; what a part leaves goes to those after it.
        seconds: for all of them.
        out: ``rows.jsonl`` and ``log.txt`` are here.

    Returns:
        Names of those that failed or had to be ended.
    """
    end = time.monotonic() + seconds - _TABLES_S
    failed = []
    for index, (parts, command) in enumerate(zip(groups, commands, strict=True)):
        name = " ".join(parts)
        box = (end - time.monotonic()) * shares[index] / sum(shares[index:])
        soft = max(box - _GRACE_S, box / 2)
        start = time.monotonic()
        filled = [argument.replace("{seconds}", f"{soft:.1f}") for argument in command]
        with (out / "log.txt").open("ab") as log:
            log.write(f"\n== {name}, at most {box:.0f} s\n".encode())
            log.flush()
            begun = log.tell()
            code = _run(filled, box, log)
        took = time.monotonic() - start
        found = [row for row in rows.read(out) if row["part"] in parts]
        ending = {0: "done", None: "ended at its limit"}.get(code, f"failed with {code}")
        print(f"{name}: {ending}, {len(found)} rows in {took:.0f} s", flush=True)
        if code != 0:
            failed.append(name)
            with (out / "log.txt").open("rb") as log:
                log.seek(begun)
                print(log.read()[-3000:].decode(errors="replace"), flush=True)
    return failed


def _run(command: Sequence[str], seconds: float, log: object) -> int | None:
    """A program's exit code, None if it had to be ended; its children end with it."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, process_group=0, cwd=ROOT,
        env=environment(),
    )  # fmt: skip
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment() -> dict[str, str]:
    """Of a part: the checkout's own package goes first, and nothing is asked of the network."""
    path = os.pathsep.join(p for p in (str(ROOT / "src"), os.environ.get("PYTHONPATH")) if p)
    return {
        **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


def _command(parts: Sequence[str], options: argparse.Namespace) -> list[str]:
    command = [
        sys.executable, str(HERE / "run.py"), "--part", *parts, "--device", options.device,
        "--out", str(options.out), "--seconds", "{seconds}",
    ]  # fmt: skip
    if options.smoke:
        command.append("--smoke")
    if options.cifar10:
        command += ["--cifar10", str(options.cifar10)]
    return command


def _inside(options: argparse.Namespace) -> int:
    """Measure the parts in this process."""
    if options.device == "cpu":  # read by Accelerate when the first trainer is made
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if "correctness" in options.part:  # cuBLAS then gives the same bits every time
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import parts

    return parts.measure(options)


def _make_tables(out: Path) -> int:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import pages

    return pages.write(out)


if __name__ == "__main__":
    sys.exit(main())
