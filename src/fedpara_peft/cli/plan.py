"""``fedpara plan``: what a federated run of a model will send, before anything is trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from peft import get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..comm.codecs import codec_names
from ..comm.ledger import PAPER_MEGABITS_PER_S, shown_bytes, shown_s
from ..federation.arguments import FederatedArguments
from ..federation.server.plan import Plan, plan
from ..federation.strategies import STRATEGIES
from ..maths.parameterizations import PARAMETERIZATIONS
from ..tuner.config import FedParaConfig
from ..tuner.summary import fedpara_summary
from .arguments import new_parser
from .errors import CommandError
from .models import AUTO_CLASSES, Base

_STRATEGIES = {name.lower(): strategy for name, strategy in STRATEGIES.items()}

_EXAMPLES = """\
examples:
  # train from scratch, ranks from the rank ratio
  fedpara plan ./my-model --base-weight replaced --gamma 0.1 --rounds 100 --clients 50 \\
      --clients-per-round 5

  # fine-tune with adapters of rank 8 on two kinds of layer; updates sent as int8
  fedpara plan ./my-model --r 8 --target-modules q_proj,v_proj --uplink-codec int8

  # a config.json is enough: no weights are loaded
  fedpara plan ./config.json --r 4

  # a classifier with a new head, which is trained and sent as a whole
  fedpara plan ./my-encoder --task-type SEQ_CLS --num-labels 5 --r 8

Bytes are those the trainer then counts, if no client drops out.
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(
        commands, "plan", "predict parameters, bytes and time of a run", _EXAMPLES, run
    )
    parser.add_argument("model", metavar="MODEL", help="folder, config.json or Hub id")
    parser.add_argument(
        "--method", choices=tuple(PARAMETERIZATIONS), default="fedpara",
        help="parameterization (default: fedpara)",
    )  # fmt: skip
    rank = parser.add_mutually_exclusive_group()
    rank.add_argument("--r", type=int, default=8, help="inner rank (default: 8)")
    rank.add_argument("--gamma", type=float, help="rank ratio in [0, 1], instead of --r")
    parser.add_argument(
        "--base-weight", choices=("frozen", "replaced", "seeded"), default="frozen",
        help="frozen: fine-tune; replaced, seeded: train from scratch (default: frozen)",
    )  # fmt: skip
    parser.add_argument(
        "--target-modules", default="all-linear", metavar="NAMES",
        help="comma-separated names, all-linear or all-supported (default: all-linear)",
    )  # fmt: skip
    parser.add_argument(
        "--task-type", choices=tuple(AUTO_CLASSES),
        help="the model that is made of MODEL's configuration, and what PEFT trains of it besides "
        "adapters, such as a classifier's head (default: the model that was saved)",
    )  # fmt: skip
    parser.add_argument("--num-labels", type=int, help="classes, with --task-type *_CLS")
    parser.add_argument(
        "--modules-to-save", metavar="NAMES",
        help="comma-separated names of modules that are trained and sent whole, such as a new head",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=100, help="default: 100")
    parser.add_argument("--clients", type=int, default=100, help="population (default: 100)")
    parser.add_argument(
        "--clients-per-round", type=int, help="cohort (default: a tenth of the clients)"
    )
    parser.add_argument(
        "--uplink-codec", default="identity", metavar="CODEC",
        help=f"{', '.join(codec_names())}, or several joined by '+'",
    )  # fmt: skip
    parser.add_argument(
        "--downlink-codec", default="identity", metavar="CODEC", help="likewise, but topk"
    )
    parser.add_argument("--strategy", choices=tuple(_STRATEGIES), default="fedavg")
    parser.add_argument(
        "--joules-per-bit", type=float, metavar="J",
        help="print energy too; there is no default, since sources differ by orders of magnitude",
    )  # fmt: skip
    parser.add_argument(
        "--megabits-per-s", type=float, nargs="+", default=list(PAPER_MEGABITS_PER_S),
        metavar="MBIT", help="a client's bandwidths (default: the paper's 2, 10 and 50)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    if args.clients < 1:
        raise CommandError(f"--clients must be at least 1, got {args.clients}")
    for name, values in (
        ("--megabits-per-s", args.megabits_per_s),
        ("--joules-per-bit", [] if args.joules_per_bit is None else [args.joules_per_bit]),
    ):
        if any(not value > 0 for value in values):
            raise CommandError(f"{name} must be positive, got {min(values):g}")
    cohort = args.clients_per_round
    if cohort is None:
        cohort = max(1, args.clients // 10)
    run_args = FederatedArguments(
        output_dir="",
        num_rounds=args.rounds,
        clients_per_round=cohort,
        uplink_codec=args.uplink_codec,
        downlink_codec=args.downlink_codec,
    )
    strategy = _STRATEGIES[args.strategy]()
    base = Base.saved(args.model, "MODEL")
    if args.num_labels is not None:
        if args.num_labels < 1:
            raise CommandError(f"--num-labels must be at least 1, got {args.num_labels}")
        base = base.with_labels(args.num_labels)
    config = FedParaConfig(
        task_type=args.task_type,
        modules_to_save=_names(args.modules_to_save) if args.modules_to_save else None,
        r=args.r,
        gamma=args.gamma,
        parameterization=args.method,
        base_weight=args.base_weight,
        target_modules=_targets(args.target_modules),
    )
    plain = _plain_model(base, args.task_type)
    dense = plan(plain, run_args, args.clients, strategy)
    _check_names(plain, config.modules_to_save)
    try:
        model = get_peft_model(plain, config)
    except NoMatchingPeftModuleError as error:
        raise CommandError(f"{args.model}: {error} Name others with --target-modules.") from None
    planned = plan(model, run_args, args.clients, strategy)
    summary = fedpara_summary(model)
    print(f"{args.model}: {type(model.get_base_model()).__name__}, {dense.num_values:,} values\n")
    print(summary)
    print()
    _print_bytes(planned, dense, args.rounds)
    for bandwidth in args.megabits_per_s:
        print(
            f"transfers at {bandwidth:g} Mbit/s: {shown_s(planned.total_s(bandwidth))} "
            f"(dense {shown_s(dense.total_s(bandwidth))}), computing left out"
        )
    if args.joules_per_bit is not None:
        ours, theirs = (p.energy_j(args.joules_per_bit) for p in (planned, dense))
        print(
            f"energy of transfers at {args.joules_per_bit:g} J/bit: {ours:,.4g} J "
            f"(dense {theirs:,.4g} J)"
        )


def _targets(text: str) -> str | list[str]:
    if text in ("all-linear", "all-supported"):
        return text
    return _names(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _plain_model(base: Base, task_type: str | None) -> nn.Module:
    """The model that was saved, or one of a task, without weights."""
    made = base if task_type is None else base.of_task(task_type)
    if made is None:
        raise CommandError(
            f"{base.model} is a {base.config.model_type} model, of which transformers has none for "
            f"{task_type}: give --task-type another of {', '.join(AUTO_CLASSES)}, or leave it out"
        )
    return made.empty()


def _check_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """PEFT passes over a module to save that is not there; a plan without it would be too low."""
    for name in names or ():
        if not any(f".{found}".endswith(f".{name}") for found, _ in model.named_modules()):
            tops = ", ".join(found for found, _ in model.named_children())
            raise CommandError(
                f"{type(model).__name__} has no module {name!r} for --modules-to-save; at its top "
                f"are {tops}"
            )


def _print_bytes(planned: Plan, dense: Plan, rounds: int) -> None:
    """Bytes of a client, a round and the run, against training the whole dense model."""
    down, up = sum(planned.downlink_bytes), sum(planned.uplink_bytes)
    print(
        f"{planned.num_values:,} values are communicated, {rounds} rounds of "
        f"{planned.cohort_size} of {planned.num_clients} clients"
    )
    if not rounds:
        return
    cohort = planned.cohort_size
    print(f"a client and round: {shown_bytes(down / rounds)} down, {shown_bytes(up / rounds)} up")
    print(
        f"a round:            {shown_bytes(cohort * down / rounds)} down, "
        f"{shown_bytes(cohort * up / rounds)} up"
    )
    total, whole = planned.total_bytes, dense.total_bytes
    share = (
        f", the dense model sent alike {shown_bytes(whole)} ({total / whole:.1%})" if whole else ""
    )
    print(f"the run:            {shown_bytes(total)}{share}")
