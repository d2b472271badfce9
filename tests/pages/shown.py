"""What the tests of pages look at: the built site, and the reports of three short runs."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.federation.test_trainer import toy
from tests.zoo import adapted, mlp

from fedpara_peft import FederatedArguments, FederatedTrainer, accuracy, partition
from fedpara_peft.integrations.comparison import write_comparison
from fedpara_peft.integrations.report import write_report

ROOT = Path(__file__).parent.parent.parent


def build(folder: Path) -> None:
    """The documentation, then ``report.html`` and ``comparison.html`` beside it."""
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    runs = [run(folder.parent / f"rate-{rate}", rate) for rate in (0.05, 0.2, 0.5)]
    write_report(runs[0], folder / "report.html")
    write_comparison(runs, folder / "comparison.html")


def run(folder: Path, rate: float) -> Path:
    """A short run's folder."""
    args = FederatedArguments(
        str(folder), num_rounds=4, learning_rate=rate, drop_out_probability=0.2, disable_tqdm=True
    )
    clients = partition(toy(), "iid", 6)
    FederatedTrainer(
        adapted(mlp()), args, clients, toy(), client_eval_dataset=clients, compute_metrics=accuracy
    ).train()
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's address: a page's search needs a server."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass
