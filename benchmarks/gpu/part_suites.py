"""The tests of maths and tuner, whose tensors are made on this device; only if asked for."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from session import Session

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("tests/maths", "tests/tuner/test_layers.py", "tests/tuner/test_autocast.py",
          "tests/tuner/test_jacobian.py", "tests/tuner/test_mixed_batch.py")  # fmt: skip


def measure(session: Session, options: argparse.Namespace) -> None:
    """Run each; what fails is listed, and is for a person to look at."""
    for suite in SUITES[-1:] if session.smoke else SUITES:
        command = [
            sys.executable, "-m", "pytest", suite, "--device", session.device,
            "-p", "no:cacheprovider", "--tb=line", "-W", "default",
        ]  # fmt: skip
        if session.smoke:
            command += ["-k", "conv1d"]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False,
                timeout=max(5.0, session.left),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            session.add("cut", done=suite, of=len(SUITES))
            return
        print(done.stdout, done.stderr, flush=True)
        counts = {
            what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error)", done.stdout)
        }
        failed = re.findall(r"^FAILED (\S+)", done.stdout, re.M)
        session.add("suite", suite=suite, counts=counts, failed=failed[:50])
        if done.returncode:
            session.failures += 1
