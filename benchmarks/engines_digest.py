"""One run everywhere: simulated, in two processes, over Flower, over NVIDIA FLARE; one digest.

    make .venv-flower-oldest/.installed .venv-flower-newest/.installed .venv-nvflare/.installed
    python benchmarks/engines_digest.py [--rounds 5]

The run is the one of ``examples/flower`` and ``examples/nvflare``: three clients of pFedPara, int8
with error feedback. Engines run as real processes, in the environments of ``make test-engines``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import table, write
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
FLOWER, FLARE = ROOT / "examples" / "flower", ROOT / "examples" / "nvflare"
LIMIT_S = 900  # of a way
SIMULATED = """
import sys
from digits_app import task
from fedpara_peft import FederatedTrainer, accuracy
args = task.arguments({"output-dir": sys.argv[1], "num-rounds": int(sys.argv[2])})
FederatedTrainer(
    task.model_fn(), args, task.clients(), task.test_set(), compute_metrics=accuracy
).train()
"""


def digest(folder: Path) -> str:
    """Of the global model of the newest checkpoint, names, shapes and bits."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(newest / "server.safetensors").items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """All ways, and whether they end in one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("flower-oldest", "flower-newest", "nvflare"):
        default = ROOT / f".venv-{name}" / "bin" / "python"
        parser.add_argument(f"--{name}", type=Path, default=default, help="its Python")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "simulated.py"
        script.write_text(SIMULATED)
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        here, rounds = Path(sys.executable), str(asked.rounds)
        flower, flare = FLOWER / "federation.py", FLARE / "federation.py"
        ways: dict[str, tuple[Path, list[str], str, str]] = {
            "simulation": (here, [str(script), "{}", rounds], "", ""),
            "two processes": (here, [*launch, str(script), "{}", rounds], "accelerate", ""),
            "Flower, oldest": (
                asked.flower_oldest, [str(flower), "--output_dir", "{}", "--num_rounds", rounds],
                "flwr", "server",
            ),
            "Flower, newest": (
                asked.flower_newest, [str(flower), "--output_dir", "{}", "--num_rounds", rounds],
                "flwr", "server",
            ),
            "NVIDIA FLARE": (
                asked.nvflare, [str(flare), "--output_dir", "{}", "--num_rounds", rounds],
                "nvflare", "server",
            ),
        }  # fmt: skip
        for way, (python, arguments, package, inside) in ways.items():
            own = folder / way.replace(" ", "-").replace(",", "")
            run(python, [argument.format(own) for argument in arguments])
            engine = f"{package} {version_of(package, python)}" if package else ""
            rows.append({"way": way, "engine": engine, "digest": digest(own / inside)})
            print(rows[-1], flush=True)
    report(rows, asked.rounds)


def run(python: Path, arguments: list[str]) -> None:
    """Run a way to its end; its output is shown where it fails."""
    paths = [str(ROOT / "src"), str(FLOWER), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    found = subprocess.run(
        [str(python), *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    if found.returncode:
        sys.exit(f"{python} {' '.join(arguments)} failed:\n{found.stdout}{found.stderr}")


def version_of(package: str, python: Path) -> str:
    """Of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def report(rows: list[dict[str, Any]], rounds: int) -> None:
    """Write the table; stop where a digest differs."""
    digests = {row["digest"] for row in rows}
    if len(digests) != 1:
        sys.exit(f"{len(digests)} different models: {rows}")
    lines = [[row["way"], row["engine"] or "–", f"`{row['digest'][:16]}`"] for row in rows]
    text = table(["", "engine", "SHA-256 of the global model, its beginning"], lines) + (
        f"\n\n{rounds} rounds of the example in `examples/flower` and `examples/nvflare`: three "
        "clients of pFedPara on handwritten digits, int8 with error feedback, one thread a "
        "process. Over engines the server and every client are processes of their own. The "
        "digest is of names, shapes, types and bits."
    )
    write("engines_digest", "One run, wherever the clients are", text, rows)


if __name__ == "__main__":
    main()
