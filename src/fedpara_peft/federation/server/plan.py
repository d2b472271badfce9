"""What a run will send, before anything is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ...comm.ledger import (
    PAPER_MEGABITS_PER_S,
    Direction,
    energy_j,
    shown_bytes,
    shown_s,
    transfer_s,
)
from ...comm.schema import schema_of
from ...comm.secure.messages import Kind, lengths
from ...comm.state import State, communicated_state
from ...tuner.scope import persistent_buffers
from ...tuner.summary import html_table
from ..arguments import FederatedArguments
from ..errors import ArgumentsError
from ..secure.fit import agreement_of, require_possible
from ..state import ServerState
from ..strategies import FedAvg, Strategy
from .channel import Channel
from .ranks import GivenRanks, ranks_of
from .round import require_fit
from .schedule import factor_blocks, resting_factors


@dataclass(frozen=True)
class Plan:
    """Bytes, energy and time of a run, predicted.

    Attributes:
        num_clients: the population.
        cohort_size: clients a round.
        reporting: of them, those that report, in expectation.
        num_values: communicated values of the model.
        downlink_bytes: by round, what one client receives; where they have different ranks, in the
            mean over all of them, rounded.
        uplink_bytes: by round, what one client sends; likewise.
    """

    num_clients: int
    cohort_size: int
    reporting: float
    num_values: int
    downlink_bytes: tuple[int, ...]
    uplink_bytes: tuple[int, ...]

    @property
    def total_bytes(self) -> float:
        """Of all clients and rounds in both directions; exact without drop-outs."""
        return self.cohort_size * sum(self.downlink_bytes) + self.reporting * sum(self.uplink_bytes)

    def energy_j(self, joules_per_bit: float) -> float:
        """Energy of all transfers; see :func:`~fedpara_peft.comm.ledger.energy_j`."""
        return energy_j(self.total_bytes, joules_per_bit)

    def total_s(self, megabits_per_s: float, compute_s: float = 0.0) -> float:
        """Wall-clock time of all rounds, clients working side by side.

        Args:
            megabits_per_s: every client's bandwidth.
            compute_s: computing time of the slowest client in a round, such as a first run's
                ``RoundReport.slowest_client_s``; left out by default.
        """
        rounds = zip(self.downlink_bytes, self.uplink_bytes, strict=True)
        return sum(compute_s + transfer_s(down + up, megabits_per_s) for down, up in rounds)

    def __str__(self) -> str:
        rounds = max(1, len(self.downlink_bytes))
        down, up = sum(self.downlink_bytes) / rounds, sum(self.uplink_bytes) / rounds
        lines = [
            f"{self.num_values:,} values are communicated, {len(self.downlink_bytes)} rounds of "
            f"{self.cohort_size} of {self.num_clients} clients",
            f"a client and round:  {shown_bytes(down)} down, {shown_bytes(up)} up",
            f"all together:        {shown_bytes(self.total_bytes)}",
        ]
        for bandwidth in PAPER_MEGABITS_PER_S:
            lines.append(
                f"transfers at {bandwidth:g} Mbit/s: {shown_s(self.total_s(bandwidth))}, "
                "computing left out"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        first, *others = str(self).splitlines()
        rows = [("values", first), *(line.split(":", 1) for line in others)]
        return html_table([(name, text.strip()) for name, text in rows])


def plan(
    model: nn.Module,
    args: FederatedArguments,
    num_clients: int,
    strategy: Strategy | None = None,
    client_ranks: GivenRanks | None = None,
) -> Plan:
    """Predict what a run sends, from its settings alone.

    The lengths of payloads follow from the model's schema and the codecs, so without drop-outs the
    bytes are those that the run then counts.

    Args:
        model: as it would be given to the trainer; also on the ``meta`` device.
        args: the run's settings.
        num_clients: size of the population.
        strategy: the federated optimizer; FedAvg by default.
        client_ranks: as the trainer takes them; the clients' names are their indices.

    Raises:
        ArgumentsError: the arguments do not fit each other or the model.
    """
    strategy = strategy or FedAvg()
    if args.buffer_size is not None:
        raise ArgumentsError(
            "a plan is of rounds that wait for their cohort, and with buffer_size clients' speeds "
            "decide who sends: plan without it"
        )
    require_fit(strategy, args)
    if args.exact_average:
        raise ArgumentsError(
            "exact_average cannot be planned: what a client is sent depends on when it took part "
            "the last time; run a few rounds and see the ledger"
        )
    cohort = args.cohort_size(num_clients)
    shared = communicated_state(model, args.local_modules) if strategy.communicates else {}
    shared = {n: t.to("meta") for n, t in shared.items()}  # schemas need no data
    buffers = frozenset(persistent_buffers(model)) & shared.keys()
    server = ServerState(0, shared, buffers=buffers)
    products = factor_blocks(model, args.factor_schedule)
    ranks = ranks_of(model, args, strategy, client_ranks, range(num_clients))
    channel = Channel(args, strategy, ranks)
    levels = Counter(ranks.level(client) for client in range(num_clients))
    if args.secure_aggregation:
        require_possible(
            args, strategy, cohort, schema_of(shared), sorted(buffers),
            ranks=client_ranks is not None,
        )  # fmt: skip

    def mean_size(direction: Direction, resting: set[str]) -> int:
        sizes = {
            level: len(channel.layout(direction, server, resting, level).form.size)
            for level in levels
        }
        return round(sum(sizes[level] * count for level, count in levels.items()) / num_clients)

    down, up = [], []
    for number in range(args.num_rounds):
        resting = resting_factors(products, number)
        down.append(mean_size("downlink", resting))
        up.append(mean_size("uplink", resting))
        if args.secure_aggregation:
            layout = channel.layout("uplink", server, resting)
            sent = {n: shared[n] for n in layout.params}
            received, up[-1] = _secure_bytes(args, strategy, number, cohort, sent)
            down[-1] += received
    return Plan(
        num_clients=num_clients,
        cohort_size=cohort,
        reporting=cohort * (1 - args.drop_out_probability),
        num_values=sum(t.numel() for t in shared.values()),
        downlink_bytes=tuple(down),
        uplink_bytes=tuple(up),
    )


def _secure_bytes(
    args: FederatedArguments, strategy: Strategy, number: int, cohort: int, sent: State
) -> tuple[int, int]:
    """What each client receives beside w_t, and sends, where masked updates are summed."""
    agreed = agreement_of(args, strategy, number, range(cohort), schema_of(sent))
    size = lengths(agreed)
    received = (Kind.ALL_KEYS, Kind.ALL_SHARES, Kind.SURVIVORS)
    down = sum(size[kind] for kind in received)
    return down, sum(size.values()) - down
