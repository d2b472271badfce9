"""The server's half of a round, wherever its clients are."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from ...comm.errors import PayloadError
from ...comm.ledger import Direction, Ledger
from ...comm.state import State
from ..arguments import FederatedArguments
from ..errors import ArgumentsError
from ..late.arrivals import Arrivals
from ..late.fit import require_late_possible
from ..late.seconds import ClientSeconds
from ..state import (
    ClientUpdate,
    CohortMean,
    LocalSteps,
    Refused,
    RoundReport,
    ServerState,
)
from ..strategies import Strategy, has_own_loss
from .admission import checked, require_quorum
from .averaging import ExactAverage
from .channel import Channel
from .cohort import Cohort
from .mean import aggregate_from_name
from .opened import OpenRound
from .privacy import AdaptiveClip, GaussianMechanism
from .sampling import drop_outs, sample_cohort
from .schedule import resting_factors

logger = logging.getLogger(__name__)

#: The most examples or tokens that a client may say it has: updates times so much stay finite.
_MOST = 2**63


class RoundServer:
    """Samples, broadcasts, takes updates in and steps.

    Args:
        args: the run's settings.
        strategy: the federated optimizer.
        channel: codecs and lengths.
        num_examples: of every client of the population; read anew in every round.
        start: the state before the first round.
        products: the model's factor blocks, where they take turns.
        names: the clients' names, their indices by default.
        exact: moves the remainders, with ``exact_average``.
        seconds: how long clients take, in a simulation that has a clock.

    Raises:
        ArgumentsError: the arguments do not fit the clients or the model.
    """

    def __init__(
        self,
        args: FederatedArguments,
        strategy: Strategy,
        channel: Channel,
        num_examples: Sequence[int],
        start: ServerState,
        products: list[list[str]],
        names: Sequence[Any] | None = None,
        exact: ExactAverage | None = None,
        seconds: ClientSeconds | None = None,
    ) -> None:
        require_fit(strategy, args)
        self._exact = exact
        self._args = args
        self._strategy = strategy
        self._channel = channel
        self._num_examples = num_examples
        self._names = range(len(num_examples)) if names is None else names
        self._products = products
        self._seconds = seconds
        self._cohort_size = args.cohort_size(len(num_examples))
        self._aggregate = aggregate_from_name(args.aggregation)
        self._privacy: GaussianMechanism | None = None
        unprotected = set(start.buffers & start.params.keys())
        directions: tuple[Direction, ...] = ("downlink", "uplink")
        for direction in directions:  # made here, so that what cannot travel shows now
            layout = channel.layout(direction, start)
            if direction == "uplink" or args.noise_mode == "central":
                # Else what comes down is made of what is protected already.
                unprotected |= {f"{g}/{n}" for g in layout.groups for n in layout.trained}
        self._adaptive = AdaptiveClip.of(args, self._cohort_size)
        if args.dp_noise_multiplier:
            self._privacy = GaussianMechanism(
                args, len(num_examples), self._cohort_size, sorted(unprotected)
            )
        central = args.noise_mode == "central"
        self._noise = self._privacy if central else None
        self._tells_loss = central or self._privacy is None

    def open(self, server: ServerState, *, encode: bool = False) -> OpenRound:
        """Sample a cohort and make what it receives.

        Args:
            server: between two rounds.
            encode: whether the payload is needed, not its length alone.
        """
        args, number = self._args, server.round
        busy = [flight.client for flight in server.flights]
        cohort = sample_cohort(
            self._num_examples, self._cohort_size - len(busy), args.seed, number,
            args.client_sampling, busy,
        )  # fmt: skip
        dropped = drop_outs(cohort, args.drop_out_probability, args.seed, number)
        resting = frozenset(resting_factors(self._products, number))
        uplink = self._channel.layout("uplink", server, resting)
        part = server.restricted(uplink.params)
        ranks, extra = self._channel.ranks, self._strategy.broadcast(part)
        levels = dict.fromkeys(ranks.level(client) for client in cohort) or {None: None}
        sent = {
            level: self._channel.downlink(
                server, extra, resting, level, encode=encode
            ).with_clip_norm(server.clip_norm)
            for level in levels
        }
        arriving = dict.fromkeys(ranks.level(client) for client in (*cohort, *busy))
        buffers = {n: server.params[n] for n in uplink.buffers}
        seconds = self._seconds
        return OpenRound(
            number=number,
            cohort=tuple(cohort),
            dropped=tuple(dropped),
            resting=resting,
            # Residuals of several ranks' payloads there are none; see ranks.py.
            server=next(iter(sent.values())).server,
            part=part,
            uplink=uplink,
            sent=sent,
            ranks=ranks,
            updates=Cohort(
                part.params,
                buffers,
                self._strategy.uplink,
                self._aggregate,
                self._strategy.sees_updates,
                ranks,
                arriving,
            ),
            exact=self._exact,
            finish_s={c: server.clock_s + seconds.of(c, number) for c in cohort} if seconds else {},
            late=None if args.buffer_size is None else Arrivals(server, args),
        )

    def received(
        self,
        opened: OpenRound,
        client: int,
        payload: bytes,
        num_examples: int,
        train_loss: float,
        steps: LocalSteps | None = None,
        terms: float | None = None,
    ) -> ClientUpdate:
        """What a client sent, decoded and admitted.

        Args:
            opened: the round.
            client: client index.
            payload: its update in bytes.
            num_examples: its examples, as it says.
            train_loss: likewise.
            steps: likewise; only strategies that see single updates ask for it.
            terms: likewise; only a mean by tokens asks for it.

        Raises:
            PayloadError: it is not what was agreed on, or may not be used.
        """
        if not 1 <= num_examples <= _MOST or not math.isfinite(train_loss):
            raise PayloadError("malformed", f"{num_examples} examples, training loss {train_loss}")
        if self._strategy.sees_updates and steps is None:
            raise PayloadError("malformed", "it does not say how many steps it made")
        if self._args.client_weighting != "tokens":
            terms = None
        elif terms is None or not 0 < terms <= _MOST:
            raise PayloadError("malformed", f"it trained on {terms} tokens, as it says")
        ranks, level = opened.ranks, opened.ranks.level(client)
        layout = self._channel.layout("uplink", opened.server, opened.resting, level)
        form = layout.form
        found: State = form.decode(payload, opened.number) if form.schema else {}
        moved, buffers, beside = layout.parted(found, opened.server.params)
        moved, beside = ranks.padded(moved, level), ranks.padded_each(beside, level)
        update = ClientUpdate(
            client, num_examples, moved, train_loss, beside, buffers, steps, terms=terms
        )
        return checked(update, self._args, opened.server.clip_norm)

    def weight(self, update: ClientUpdate) -> float:
        """Of an update in the cohort's mean."""
        args = self._args
        uniform = self._strategy.weighting == "uniform" or args.client_sampling == "weighted"
        uniform |= args.client_weighting == "uniform"
        return 1.0 if uniform or args.dp_noise_multiplier else update.size

    def take_in(self, opened: OpenRound, update: ClientUpdate) -> None:
        """Use a checked update, a late one for less; call it in client order."""
        weight = self.weight(update)
        discount = 1.0 if opened.late is None else opened.late.used(update.client)
        opened.updates.add(update, weight, discount)
        if opened.exact is not None:
            start = opened.ranks.only(opened.part.params, opened.ranks.level(update.client))
            moved = {n: start[n] + change for n, change in update.update.items()}
            opened.factors[update.client] = opened.exact.own_factors(moved), weight

    def refuse(self, opened: OpenRound, refused: Refused) -> None:
        """Note an update that is not used, by its client's name."""
        message = f"client {self._names[refused.client]!r}: {refused.message}"
        logger.warning("round %d, %s", opened.number + 1, message)
        opened.updates.refused.append(dataclasses.replace(refused, message=message))

    def close(self, opened: OpenRound) -> tuple[ServerState, CohortMean]:
        """The server after the round, and the mean it stepped by (noise left out).

        Raises:
            RoundError: too few updates can be used.
        """
        updates = opened.updates
        quorum = self._args.quorum
        if quorum is None and self._noise is not None:
            quorum = 0.0  # with noise it must not show that everybody was refused
        require_quorum(updates.count, updates.refused, len(opened.ended), quorum)
        mean = updates.mean(len(self._num_examples))
        stepped = opened.part
        if updates.count or self._noise is not None:  # that nobody came must not show
            stepped = self._strategy.server_step(opened.part, self._noisy(mean, opened))
            stepped = opened.ranks.with_resting(stepped, opened.part, updates.levels)
        params = {**stepped.params, **updates.buffers()}
        next_round = dataclasses.replace(stepped, params=params, round=opened.number + 1)
        flights = () if opened.late is None else opened.late.at_work
        after = opened.server.updated(next_round)
        adaptive = self._adaptive
        clip = None
        if adaptive is not None:
            clip = adaptive.next(opened.server, updates.within, updates.count)
        after = dataclasses.replace(after, clock_s=opened.clock_s, flights=flights, clip_norm=clip)
        if opened.exact is not None:
            taken = {client: factors for client, (factors, _) in opened.factors.items()}
            weights = [weight for _, weight in opened.factors.values()]
            after = opened.exact.after(opened.server, after, mean.update, taken, weights)
        return after, mean

    def report(
        self,
        opened: OpenRound,
        ledger: Ledger,
        seconds: float,
        dropped: Sequence[int] = (),
        averaging_bias: float | None = None,
        slowest_client_s: float | None = None,
    ) -> RoundReport:
        """What happened in a closed round, evaluation left out.

        Args:
            opened: the round.
            ledger: with its transfers.
            seconds: how long it took.
            dropped: clients that did not report, of those whose turns ended.
            averaging_bias: where it was measured.
            slowest_client_s: where it was measured.
        """
        number, updates, names = opened.number + 1, opened.updates, self._names
        mean_age, oldest = (None, None) if opened.late is None else opened.late.ages
        return RoundReport(
            round=number,
            cohort=tuple(names[client] for client in opened.ended),
            dropped=tuple(names[client] for client in sorted(dropped)),
            refused=tuple((names[r.client], r.reason) for r in updates.refused),
            train_loss=updates.train_loss if self._tells_loss else None,
            metrics={},
            uplink_bytes=ledger.total_bytes(number, "uplink"),
            downlink_bytes=ledger.total_bytes(number, "downlink"),
            header_bytes=ledger.header_bytes(number),
            averaging_bias=averaging_bias,
            epsilon=self.epsilon(number),
            clip_norm=opened.server.clip_norm,
            seconds=seconds,
            slowest_client_s=slowest_client_s,
            clock_s=None if self._seconds is None else opened.clock_s,
            staleness_mean=mean_age,
            staleness_max=oldest,
        )

    def epsilon(self, rounds: int) -> float | None:
        """ε of differential privacy after so many rounds; None without noise."""
        return None if self._privacy is None else self._privacy.epsilon(rounds)

    def _noisy(self, mean: CohortMean, opened: OpenRound) -> CohortMean:
        if self._noise is None:
            return mean
        seed = opened.server.noise_seed
        assert seed is not None
        noisy = self._noise.add_noise(
            mean.update, opened.updates.count, seed, opened.number, opened.server.clip_norm
        )
        return dataclasses.replace(mean, update=noisy, share=self._noise.share)


def require_fit(strategy: Strategy, args: FederatedArguments) -> None:
    """Raise unless the strategy is right under these settings.

    Raises:
        ArgumentsError: it is not.
    """
    require_late_possible(strategy, args)
    obstacle = strategy.obstacle(args)
    if args.client_weighting == "tokens" and strategy.weighting == "uniform":
        obstacle = "client_weighting='tokens': its algebra is of clients that weigh alike"
    if args.dp_noise_multiplier and strategy.sees_updates:
        obstacle = "dp_noise_multiplier: it sees single updates, and only their mean has noise"
        if args.dp_mode == "local":
            obstacle = "dp_mode='local': it asks how many steps a client made, which has no noise"
    if args.jacobian_correction and has_own_loss(strategy):
        obstacle = "jacobian_correction: its local loss may ask for the model at several weights"
    if obstacle:
        raise ArgumentsError(
            f"{type(strategy).__name__} cannot have {obstacle}; change that, or take another "
            "strategy"
        )
