"""FLARE's own FedAvg around a script for its client API, whose model is PEFT's with FedPara.

python examples/nvflare/stock.py --output_dir outputs/nvflare-stock
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flare_digits import SITES
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner

HERE = Path(__file__).parent


def stock_job(folder: Path, num_rounds: int) -> FedJob:
    """Nothing of ours on the server: it averages whatever tensors the sites send."""
    job = FedJob("digits-stock", min_clients=len(SITES))
    job.to_server(FedAvg(num_clients=len(SITES), num_rounds=num_rounds))
    for site in SITES:
        job.to(ScriptRunner(str(HERE / "client_api.py"), f"--folder {folder / 'sites'}"), site)
        job.to(str(HERE / "flare_digits.py"), site)
    return job


def main() -> None:
    """Run it in FLARE's simulator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/nvflare-stock"))
    parser.add_argument("--num_rounds", type=int, default=5)
    asked = parser.parse_args()
    folder = asked.output_dir.resolve()
    job = stock_job(folder, asked.num_rounds)
    if code := job.simulator_run(str(folder / "workspace"), threads=len(SITES)):
        sys.exit(f"the job failed ({code}): see {folder}/workspace/server/simulate_job/log.txt")
    print(f"the sites' own halves: {folder / 'sites'}")


if __name__ == "__main__":
    main()
