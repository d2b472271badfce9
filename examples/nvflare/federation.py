"""A federation on NVIDIA FLARE, in its simulator: every site is a process of its own.

    python examples/nvflare/federation.py --output_dir outputs/nvflare

``--export`` writes the job instead, for ``nvflare job submit`` on a real federation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flare_digits import SITES
from nvflare.job_config.api import FedJob

from fedpara_peft.integrations.nvflare import fedpara_job

HERE = Path(__file__).parent


def digits_job(folder: Path, num_rounds: int) -> FedJob:
    """The controller for the server, an executor for each site, and the task's own code."""
    return fedpara_job(
        "digits",
        server="flare_digits:server",
        node="flare_digits:node",
        sites=SITES,
        config={"folder": str(folder), "num_rounds": num_rounds},
        scripts=[str(HERE / "flare_digits.py")],
    )


def main() -> None:
    """Run the federation, or export its job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/nvflare"))
    parser.add_argument("--num_rounds", type=int, default=10)
    parser.add_argument("--export", type=Path, help="where to write the job")
    asked = parser.parse_args()
    folder = asked.output_dir.resolve()
    job = digits_job(folder, asked.num_rounds)
    if asked.export:
        job.export_job(str(asked.export))
        return
    if code := job.simulator_run(str(folder / "workspace"), threads=len(SITES)):
        sys.exit(f"the job failed ({code}): see {folder}/workspace/server/simulate_job/log.txt")
    rounds = json.loads((folder / "server" / "history.json").read_text())
    sent = sum(r["uplink_bytes"] + r["downlink_bytes"] for r in rounds)
    print(f"{len(rounds)} rounds, {sent / 1e6:.2f} MB sent, loss {rounds[-1]['train_loss']:.3f}")
    print(f"global model: {folder / 'server' / 'model'}")


if __name__ == "__main__":
    main()
