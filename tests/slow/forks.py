"""Runs in processes that are killed: forked from one that has torch loaded already."""

import multiprocessing
import signal

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.federation.runs", "tests.slow.faults"])


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
