"""What a model card tells of a run."""

from __future__ import annotations

from ...comm.ledger import shown_bytes
from ..arguments import FederatedArguments
from ..strategies import Strategy
from .history import History


def training_facts(
    history: History, args: FederatedArguments, strategy: Strategy, num_clients: int, round: int,
    local_trainer: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """A run in a few lines, as text by name.

    Args:
        history: of all its rounds.
        args: its settings.
        strategy: its federated optimizer.
        num_clients: its population.
        round: the round whose model is in place: the last one, or the best.
        local_trainer: the name of what trained the clients, where they had a trainer of others,
            with a learning rate of its own.
    """
    up = sum(report.uplink_bytes for report in history)
    down = sum(report.downlink_bytes for report in history)
    facts = {
        "rounds": f"{len(history):,}"
        + (f"; this is the model after round {round:,}" if round < len(history) else ""),
        "clients": f"{num_clients:,}, {args.cohort_size(num_clients):,} "
        + ("in a round" if args.buffer_size is None else f"at work, {args.buffer_size:,} a round"),
        "strategy": type(strategy).__name__,
        **(
            {"learning rate": f"{args.learning_rate:g}"}
            if local_trainer is None
            else {"local training": local_trainer}
        ),
        "sent": f"{shown_bytes(up + down)} ({shown_bytes(up)} up, {shown_bytes(down)} down)",
    }
    up_codec, down_codec = str(args.uplink_codec), str(args.downlink_codec)
    if (up_codec, down_codec) != ("identity", "identity"):
        facts["codecs"] = f"{up_codec} up, {down_codec} down"
    until = history.rounds[:round]
    evaluated = next((report for report in reversed(until) if report.metrics), None)
    if evaluated is not None:
        for name, value in evaluated.metrics.items():
            facts[name] = f"{value:.4g} after round {evaluated.round}"
    epsilon = next((r.epsilon for r in reversed(history.rounds) if r.epsilon is not None), None)
    if epsilon is not None:
        facts["ε"] = f"{epsilon:.3g} at δ = {args.dp_delta:g}"
        if args.dp_mode != "central":
            facts["ε"] += f" against the server, by {args.dp_mode} noise"
    return facts
