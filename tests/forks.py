"""Processes of their own that are forked from one which has loaded torch: many begin at no cost."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.federation.runs",
        "tests.slow.faults",
        # What most examples import.
        "datasets",
        "matplotlib.pyplot",
        "transformers.models.llama.modeling_llama",
    ]
)


def started(function, *args):
    """A process that runs a function of a module."""
    process = FORKS.Process(target=function, args=args)
    process.start()
    return process


def kill(process):
    """Send SIGKILL; whether the process died of that, and had not ended already."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def finish(process):
    """Wait for a process that must succeed."""
    process.join()
    assert process.exitcode == 0


def run_script(script, *arguments, timeout=300):
    """What ``python SCRIPT ARGUMENTS`` does and says: ``subprocess.run`` without the imports."""
    words = [str(word) for word in (script, *arguments)]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        process = started(_script, words, *map(str, said))
        process.join(timeout)
        if process.is_alive():
            kill(process)
            raise subprocess.TimeoutExpired(words, timeout, *(f.read_text() for f in said))
        return subprocess.CompletedProcess(
            words, process.exitcode, *(file.read_text() for file in said)
        )


def _script(words, *files):
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        stream.flush()
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
