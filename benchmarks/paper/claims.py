"""Every claim of the paper beside what was found here: ``results/paper/claims.md``."""

from __future__ import annotations

from dataclasses import dataclass

from cells import FAN_IN_HE, RESULTS, Results
from findings import (
    Measure,
    against,
    beside_dense,
    counted,
    fewer_bytes,
    full_rank,
    no_collapse,
    over_low_rank,
    personal,
    quantized,
    rising_gamma,
    strategies,
    variant,
)
from report import table
from tables import LABELS
from why import why


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
        says: the claim.
        paper: the paper's figures; those marked ~ are recalled, not copied.
        measure: finds ours, by scale.
        command: what to run for it.
        table: where the figures are, ``{scale}`` for the scale.
        why: what explains a difference, or what to know about the set-up.
    """

    says: str
    paper: str
    measure: Measure
    command: str
    table: str
    why: str = ""


RUN = "benchmarks/paper/run.py"
COUNTS = "benchmarks/paper/counts.py"
SEEDED = (
    ("CIFAR-10, IID", "cifar10", "iid"),
    ("CIFAR-10, Dirichlet 0.5", "cifar10", "dirichlet"),
    ("CIFAR-10 with VGG16, IID", "cifar10-vgg16", "iid"),
)
CLAIMS = (
    Claim("Counts of Tab. 1: matrix; kernel by Prop. 1; by Prop. 3", "16,384; 81,920; 20,992",
          counted(["256 x 256 matrix, r = 16", "256 x 256 x 3 x 3 kernel, r = 16, Prop. 1",
                   "256 x 256 x 3 x 3 kernel, r = 16, Prop. 3"], "ours", "the paper"),
          COUNTS, "counts"),
    Claim("VGG16 needs a tenth (γ = 0.1), 29% (0.4), 22% (0.3) of its parameters",
          "10.15%, 29.4%, 21.8%",
          counted([f"VGG16, 10 classes: fedpara, γ = {g}" for g in (0.1, 0.4, 0.3)], "share",
                  within=0.15), COUNTS, "counts",
          "With 100 classes γ = 0.4 has 29.6%."),
    Claim("The LSTM needs a fifth", "19%",
          counted(["LSTM, 80 characters: fedpara, γ = 0"], "share", within=0.5),
          COUNTS, "counts"),
    Claim("pFedPara sends 3.4 times less, FedPer 1.07 times", "3.4; 1.07",
          counted(["pFedPara, γ = 0.5", "FedPer"], "times fewer than the original",
                  within=0.05), COUNTS, "counts",
          "MLP 784-256-62, γ = 0.5; encoded payloads. pFedPara: 3.15 than FedPer."),
    Claim("Random 100 x 100 weights with r = 10 have full rank (Fig. 6)", "practically all",
          full_rank, "benchmarks/figure6_rank.py", "../figure6_rank"),
    *(
        Claim(f"FedPara passes low-rank of its size: {name} (Tab. 2)", paper,
              over_low_rank(task, split, gamma), f"{RUN} --only table2",
              f"{{scale}}-{task}")
        for name, paper, task, split, gamma in (
            ("CIFAR-10, IID", "~ 77.6 → 82.9", "cifar10", "iid", None),
            ("CIFAR-10, Dirichlet 0.5", "~ 67.8 → 71.4", "cifar10", "dirichlet", None),
            ("CIFAR-10, IID, γ = 0", "", "cifar10", "iid", 0.0),
            ("CIFAR-10 with VGG16, IID", "~ 77.6 → 82.9", "cifar10-vgg16", "iid", None),
            ("CIFAR-10 with VGG16, Dirichlet 0.5", "~ 67.8 → 71.4", "cifar10-vgg16", "dirichlet",
             None),
            ("CIFAR-100, IID", "~ 34.2 → 45.8", "cifar100", "iid", None),
            ("CIFAR-100, Dirichlet 0.5", "~ 30.3 → 43.9", "cifar100", "dirichlet", None),
            ("CINIC-10, IID", "~ 64.0 → 70.4", "cinic10", "iid", None),
            ("CINIC-10, Dirichlet 0.5", "~ 60.8 → 65.0", "cinic10", "dirichlet", None),
            ("Shakespeare, IID", "~ 54.6 → 63.7", "shakespeare", "iid", None),
            ("Shakespeare, by role", "~ 51.2 → 51.6", "shakespeare", "role", None),
        )
    ),
    Claim("FedPara passes low-rank of its size: CIFAR-10, IID, both started with He's fan-in "
          "variance in every factor", "",
          over_low_rank("cifar10", "iid", variant=FAN_IN_HE), f"{RUN} --only ablations",
          "{scale}-cifar10"),
    *(
        Claim(f"FedPara is as accurate as dense: {name}", "comparable",
              beside_dense(task, split), f"{RUN} --only table2", f"{{scale}}-{task}",
              "Comparable: at most two points below.")
        for name, task, split in (
            ("CIFAR-10, IID", "cifar10", "iid"),
            ("CIFAR-10, Dirichlet 0.5", "cifar10", "dirichlet"),
            ("CIFAR-10 with VGG16, IID", "cifar10-vgg16", "iid"),
            ("Shakespeare, IID", "shakespeare", "iid"),
            ("Shakespeare, by role", "shakespeare", "role"),
        )
    ),
    *(
        Claim(f"Fewer bytes to the same accuracy: {name} (Fig. 3)", "2.8 to 10.1 times",
              fewer_bytes(task, split), f"{RUN} --only figure3", f"{{scale}}-{task}")
        for name, task, split in (
            ("CIFAR-10, IID", "cifar10", "iid"),
            ("CIFAR-10, Dirichlet 0.5", "cifar10", "dirichlet"),
            ("CIFAR-10 with VGG16, IID", "cifar10-vgg16", "iid"),
            ("Shakespeare, IID", "shakespeare", "iid"),
            ("Shakespeare, by role", "shakespeare", "role"),
        )
    ),
    Claim("Accuracy mostly rises with γ (Fig. 4)", "mostly rises", rising_gamma,
          f"{RUN} --only figure4", "{scale}-cifar10",
          "Yes: in three of four steps or more."),
    Claim("Plenty of local data: local-only beats FedAvg, pFedPara beats all (Fig. 5)",
          "pFedPara first",
          personal(0, lambda m: m["pfedpara"] == max(m.values()) and m["local"] > m["fedavg"]),
          f"{RUN} --only figure5", "{scale}-mnist"),
    Claim("A fifth of the data: FedAvg beats local-only, pFedPara beats all (Fig. 5)",
          "pFedPara first",
          personal(1, lambda m: m["pfedpara"] == max(m.values()) and m["fedavg"] > m["local"]),
          f"{RUN} --only figure5", "{scale}-mnist"),
    Claim("At most two classes a client: FedAvg falls behind, pFedPara at or above all (Fig. 5)",
          "pFedPara at the top",
          personal(2, lambda m: m["fedavg"] == min(m.values())
                   and m["pfedpara"] >= max(m.values()) - 0.005),
          f"{RUN} --only figure5", "{scale}-mnist",
          "At the top: within half a point."),
    Claim("SCAFFOLD and FedDyn improve FedPara over FedAvg (Tab. 3)",
          "~ FedDyn 86.1, SCAFFOLD 84.7, FedAvg 82.9, FedAdam 82.5, FedProx 79.0", strategies,
          f"{RUN} --only table3", "{scale}-cifar10"),
    Claim("Quantized uploads (FedPAQ) go with FedPara", "compatible", quantized,
          f"{RUN} --only fedpaq", "{scale}-cifar10"),
    Claim("tanh helps (appendix)", "a little", variant("tanh"), f"{RUN} --only ablations",
          "{scale}-cifar10"),
    Claim("The Jacobian correction helps (appendix)", "a little",
          variant("Jacobian correction, λ = 0.1"), f"{RUN} --only ablations",
          "{scale}-cifar10", "λ = 0.1; with λ = 1 and this rate nothing is learnt."),
    *(
        Claim(f"A base drawn from a seed helps {LABELS[method]}: {name}", "",
              against(task, split, f"{method} seeded", method), f"{RUN} --only table2",
              f"{{scale}}-{task}", "Not of the paper: the same bytes, another start.")
        for method in ("fedpara", "lowrank")
        for name, task, split in SEEDED
    ),
    *(
        Claim(f"Both with such a base, FedPara passes low-rank of its size: {name}", "",
              against(task, split, "fedpara seeded", "lowrank seeded"), f"{RUN} --only table2",
              f"{{scale}}-{task}", "Not of the paper.")
        for name, task, split in SEEDED
    ),
    *(
        Claim(f"FedPara with such a base is as accurate as dense: {name}", "",
              beside_dense(task, split, "fedpara seeded"), f"{RUN} --only table2",
              f"{{scale}}-{task}", "Comparable: at most two points below.")
        for name, task, split in SEEDED
    ),
    *(
        Claim(f"Fewer bytes to the same accuracy, with such a base: {name}", "",
              fewer_bytes(task, split, "fedpara seeded"), f"{RUN} --only figure3",
              f"{{scale}}-{task}", "By the paper's measure: 2.8 times or more.")
        for name, task, split in SEEDED
    ),
    Claim("Without clipping no run collapses: Shakespeare, IID", "", no_collapse,
          f"{RUN} --only unclipped", "{scale}-shakespeare", "Not of the paper."),
)  # fmt: skip


def write_results(results: Results) -> None:
    """Write ``results/paper/claims.md``."""
    lines = []
    for claim in CLAIMS:
        found = {scale: claim.measure(scale, results) for scale in ("cpu", "wide", "full")}
        if found["cpu"] == found["full"] == found["wide"]:  # a count, or not run at all
            found = {"": found["cpu"]}
        for scale, finding in found.items():
            if finding is None and scale:
                continue
            here, same = finding or ("not run", "")
            name = claim.table.format(scale=scale)
            where = f", [table]({name}.md)" if finding else ""
            lines.append([claim.says, claim.paper, f"{scale}: {here}" if scale else here, same,
                          f"`python {claim.command}`{where}", claim.why])  # fmt: skip
    head = ["claim", "the paper", "here", "same", "command", "remark"]
    text = PREFACE + table(head, lines, numbers=False) + "\n" + why(results)
    (RESULTS / "claims.md").write_text(text)


PREFACE = """# The paper's claims, measured

[FedPara](https://arxiv.org/abs/2108.06098) claims what the first column says. The paper's figures
marked ~ are quoted from memory. Accuracies are in percent, of the global model on held-out data
unless said otherwise, mean of three seeds; "yes" where methods are compared means ahead in every
seed, "level" that seeds disagree. Scale `cpu` is small enough for two cores: narrow nets, few
rounds, less data. Scale `wide` has the paper's nets at their width and fewer rounds, for a GPU's
minutes. Scale `full` is the paper's set-up for a GPU; **it has not been run**:
`make bench-paper SCALE=full` does. Written by `benchmarks/paper/run.py`.

"""
