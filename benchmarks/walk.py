"""Follow the README as a newcomer would, in a fresh clone, and time every step.

    python benchmarks/walk.py

Each of the README's three uses runs in a process of its own as it is printed there, and then does
what one would do next: save, merge, take a personal model out. Nothing is kept but the table.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import table, write

ROOT = Path(__file__).parents[1]
#: What follows on each of the README's Python blocks.
NEXT = (
    (
        "an adapter, saved and merged",
        'model.save_pretrained("adapter")\nmodel.merge_and_unload().save_pretrained("merged")\n',
    ),
    ("from scratch in a federation, saved and merged", ""),
    (
        "a model for each client, one of them merged",
        "plain = trainer.client_model(3).merge_and_unload()\n"
        'torch.save(plain.state_dict(), "client-3.pt")\n',
    ),
)


def main() -> None:
    """Walk, and write ``results/walk.md``."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")

        def step(name: str, *command: str | Path) -> None:
            begin = time.perf_counter()
            done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: {done.stdout}{done.stderr}")
            rows.append({"step": name, "seconds": time.perf_counter() - begin})
            print(f"{name}: {rows[-1]['seconds']:.0f} s", flush=True)

        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        step("`make install`", "make", "install", f"PYTHON={sys.executable}")
        step("`make demo`, installed", "make", "demo")
        blocks = re.findall(r"```python\n(.*?)```", (clone / "README.md").read_text(), re.S)
        for (name, after), block in zip(NEXT, blocks, strict=True):
            step(name, clone / ".venv" / "bin" / "python", "-c", block + after)
    later = sum(row["seconds"] for row in rows[1:])
    text = (
        "Installation is what the package registry gives; each use is a new process, of which "
        "most is the import of torch, transformers and PEFT.\n\n"
        + table(["step", "seconds"], [[row["step"], f"{row['seconds']:.0f}"] for row in rows])
        + f"\n\nAfter installation, together: {later:.0f} s."
    )
    write("walk", "The README, followed step by step", text, rows)


if __name__ == "__main__":
    main()
