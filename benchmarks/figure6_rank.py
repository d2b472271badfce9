"""Fig. 6 of the paper: the rank of random FedPara weights at the least unrestricted inner rank.

    python benchmarks/figure6_rank.py

W = (X₁Y₁ᵀ) ⊙ (X₂Y₂ᵀ), 100 x 100, r₁ = r₂ = 10, 1,000 draws of Gaussian factors in float64 (in
float32 a small singular value can pass for zero); beside it the low-rank baseline of the same size.
"""

from __future__ import annotations

from collections import Counter

import matplotlib
import torch
from report import RESULTS, table, write

from fedpara_peft.maths.compose import Half, compose

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIZE, R, DRAWS = 100, 10, 1000


def draw(r: int) -> Half:
    """Factors of one half."""
    return Half(*(torch.randn(SIZE, r, dtype=torch.float64) for _ in "xy"))


def main() -> None:
    """Draw, count, write table and picture."""
    torch.manual_seed(0)
    ranks = {
        "FedPara, r = 10": [
            int(torch.linalg.matrix_rank(compose([draw(R), draw(R)]))) for _ in range(DRAWS)
        ],
        "low-rank, r = 20": [
            int(torch.linalg.matrix_rank(compose([draw(2 * R)], "lowrank"))) for _ in range(DRAWS)
        ],
    }
    rows = [
        {"weight": name, "draws": DRAWS, "ranks": dict(Counter(values))}
        for name, values in ranks.items()
    ]
    lines = [
        [name, f"{4 * R * SIZE:,}", str(min(v)), str(max(v)), f"{v.count(SIZE) / DRAWS:.1%}"]
        for name, v in ranks.items()
    ]
    text = table(["weight", "parameters", "least rank", "largest", "full rank"], lines)
    write("figure6_rank", "Rank of random 100 x 100 weights (Fig. 6)", text, rows)
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (name, values), hatch in zip(ranks.items(), ("", "//"), strict=True):
        axes.hist(values, bins=range(0, SIZE + 3, 2), label=name, hatch=hatch, edgecolor="black")
    axes.set(xlabel="rank of W (full rank: 100)", ylabel=f"draws of {DRAWS:,}", xlim=(0, 104))
    axes.legend(frameon=False, loc="upper center")
    figure.savefig(RESULTS / "figure6_rank.png", dpi=150)


if __name__ == "__main__":
    main()
