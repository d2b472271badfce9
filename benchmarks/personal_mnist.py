"""pFedPara, FedPer, FedAvg and local-only on MNIST with at most two classes a client.

    python benchmarks/personal_mnist.py --data FOLDER_OR_HUB_ID

Ten clients, all in every round, the example's two-layer perceptron, each client's own model tested
on its own held-out fifth. Plentiful: 600 images a client, 10 rounds of 5 epochs. Scarce: 50 images,
60 rounds of 2 epochs. Each method's learning rate is the best of the same grid by mean accuracy
over a seed that the table does not use.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import table, write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from personalize_mnist import METHODS, PersonalArguments, load_images, train

from fedpara_peft import FederatedArguments

GRID = (0.1, 0.2, 0.4, 0.8)
TUNING_SEEDS = (100,)
SEEDS = (0, 1, 2)
SETTINGS = {
    "plentiful": {"examples_per_client": 600, "num_rounds": 10, "num_local_epochs": 5},
    "scarce": {"examples_per_client": 50, "num_rounds": 60, "num_local_epochs": 2},
}


def run(
    method: str, setting: str, rate: float, seed: int, personal: PersonalArguments, data: Any
) -> dict[str, Any]:
    """Train once."""
    chosen = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedArguments(
            folder, num_rounds=chosen["num_rounds"], num_local_epochs=chosen["num_local_epochs"],
            per_client_batch_size=10, learning_rate=rate, learning_rate_decay=0.999,
            max_grad_norm=5.0, seed=seed, eval_every=chosen["num_rounds"] // 10, disable_tqdm=True,
        )  # fmt: skip
        history = train(method, personal, args, data).history
    found = history[-1].metrics
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "mean": found["client_accuracy_mean"],
        "worst_decile": found["client_accuracy_worst_decile"],
        "std": found["client_accuracy_std"],
        "bytes_per_client_and_round": history.total_bytes / len(history) / personal.num_clients,
        "curve": [(r, v) for r, _, v in history.curve("client_accuracy_mean")],
    }


def main() -> None:
    """Tune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="ylecun/mnist", help="a Hub data set or a folder")
    where = parser.parse_args().data
    rows, lines = [], []
    for setting, chosen in SETTINGS.items():
        personal = PersonalArguments(data=where, examples_per_client=chosen["examples_per_client"])
        data, _ = load_images(personal)
        for method in METHODS:
            tuned = {
                rate: statistics.mean(
                    run(method, setting, rate, s, personal, data)["mean"] for s in TUNING_SEEDS
                )
                for rate in GRID
            }
            best = max(tuned, key=lambda rate: tuned[rate])
            found = [run(method, setting, best, seed, personal, data) for seed in SEEDS]
            rows += found
            values = [100 * row["mean"] for row in found]
            lines.append(
                [
                    f"{setting}, {method}",
                    f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}",
                    f"{100 * statistics.mean(row['worst_decile'] for row in found):.1f}",
                    f"{100 * statistics.mean(row['std'] for row in found):.1f}",
                    f"{found[0]['bytes_per_client_and_round'] / 1e3:,.0f}",
                    f"{best}",
                ]
            )
            print(lines[-1], flush=True)
    header = [
        "clients' data, method", "accuracy on own data, %", "worst tenth of clients",
        "spread over clients", "kB a client and round, up and down", "learning rate",
    ]  # fmt: skip
    text = table(header, lines) + (
        "\n\nMean ± standard deviation of three seeds, each with its own partition. MNIST, at most "
        "two classes a client; a client's 600 or 50 images include the held-out fifth."
    )
    write("personal_mnist", "Personal models on MNIST", text, rows)


if __name__ == "__main__":
    main()
