"""What a node does with a message: it trains its client, and keeps the client's state on disk."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ...comm.errors import PayloadError
from ...comm.state import State
from ...federation.arguments import FederatedArguments
from ...federation.client.local import LocalTrainer, Trained
from ...federation.client.trainers.given import LocalTrainerFactory, given_trainer
from ...federation.client.turn import Held, Turns, at_rest
from ...federation.data.batches import Collator, count_rows
from ...federation.data.fingerprint import base_facts, model_facts, settings_facts
from ...federation.data.loss import DefaultLoss, LossFunction
from ...federation.errors import ClientDataError, RoundError, about
from ...federation.folder.checkpoint import must_agree
from ...federation.folder.store import DiskStore
from ...federation.secure.fit import require_plain
from ...federation.server.admission import usable_state
from ...federation.server.averaging import ExactAverage
from ...federation.server.channel import Channel
from ...federation.server.ranks import GivenRanks, ranks_of
from ...federation.server.schedule import factor_blocks, resting_factors
from ...federation.state import Broadcast, ClientState
from ...federation.strategies import Strategy, as_strategy

logger = logging.getLogger(__name__)

#: Arguments that only the server reads.
_SERVERS = {
    "client_fraction", "clients_per_round", "client_sampling", "drop_out_probability",
    "aggregation", "quorum", "dp_noise_multiplier", "dp_noise_seed", "dp_delta", "engine",
    "buffer_size", "concurrency", "max_staleness", "staleness_exponent", "client_seconds_sigma",
    "clip_learning_rate", "clip_count_std",
}  # fmt: skip
_RUN = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class NodeSetup:
    """What a node brings along.

    Attributes:
        model_fn: makes the model; seed it, so that all nodes and the server make the same.
        data_fn: a client's examples, by client index.
        args: the run's settings, the server's own.
        state_dir: the node's folder for what its clients keep; it never leaves the machine.
        strategy: the federated optimizer, the server's own.
        compute_loss: ``(model, batch) -> loss``, ``(loss, logits)`` or ``(loss, logits, terms)``.
        data_collator: makes a batch from rows.
        client_ranks: how many columns the node's client trains; see
            :mod:`~fedpara_peft.federation.server.ranks`.
        local_trainer: what trains the client in place of this package's own steps, the server's
            own; see :class:`~fedpara_peft.federation.client.trainers.given.GivenTrainer`.
    """

    model_fn: Callable[[], nn.Module]
    data_fn: Callable[[int], Any]
    args: FederatedArguments
    state_dir: str
    strategy: Strategy | type[Strategy] | str | None = None
    compute_loss: LossFunction | None = None
    data_collator: Collator | None = None
    client_ranks: GivenRanks | None = None
    local_trainer: LocalTrainerFactory | None = None


@dataclass(frozen=True)
class Job:
    """A round as a client sees it.

    Attributes:
        run: the run's own name; a client's states of several runs do not mix.
        round: rounds completed.
        kept: the version of the client's state that goes with the server's: the last round in which
            its update was used. What the client learnt after it is forgotten.
        needed: rounds to which the server may return.
        payload: the broadcast, and behind it what the client has missed of the remainders.
        missed: how to read that, with ``exact_average``: the numbers of
            :class:`~fedpara_peft.federation.server.averaging.exact.CatchUp`.
        clip_norm: what its update will be clipped to, where that follows the updates' norms.
    """

    run: str
    round: int
    kept: int
    needed: tuple[int, ...]
    payload: bytes
    missed: tuple[int, ...] = ()
    clip_norm: float | None = None


@dataclass(frozen=True)
class Answer:
    """What a client sends.

    Attributes:
        round: rounds completed before it.
        num_examples: its examples.
        train_loss: mean loss over its local steps.
        payload: its update; empty if there is none.
        steps: how it trained, where the strategy asks for it: the fields of
            :class:`~fedpara_peft.federation.state.LocalSteps`, without a weight that is not known.
        terms: of how many terms its losses were the means, where clients weigh so much.
        reason: why there is none.
        message: what was found, and what helps.
    """

    round: int
    num_examples: int = 0
    train_loss: float = 0.0
    payload: bytes = b""
    steps: tuple[float, ...] = ()
    terms: float | None = None
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself.

    Attributes:
        num_examples: its client's.
        facts: what its app was given, by name.
    """

    num_examples: int
    facts: Mapping[str, Any]


def node_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a run was given, what a node must have in common with the server."""
    shaping = {n: v for n, v in must_agree(facts).items() if n not in _SERVERS}
    return json.loads(json.dumps(shaping))


class Node:
    """Trains clients in one model, which is never rebuilt.

    Args:
        setup: model, data and settings.
    """

    def __init__(self, setup: NodeSetup) -> None:
        require_plain(setup.args, "nodes")
        self._setup = setup
        args, strategy = setup.args, as_strategy(setup.strategy)
        accelerator = Accelerator()
        model = setup.model_fn().to(accelerator.device)
        loss = setup.compute_loss or DefaultLoss(args.label_column)
        self._strategy = strategy
        ranks = ranks_of(model, args, strategy, setup.client_ranks, None)
        self._channel = Channel(args, strategy, ranks)
        given = given_trainer(setup.local_trainer, model, args, strategy)
        self._local = LocalTrainer(
            model, args, accelerator, strategy, loss, setup.data_collator, given=given
        )
        self._products = factor_blocks(model, args.factor_schedule)
        first = self._local.first_server()
        self._exact = ExactAverage(model, first) if args.exact_average else None
        self._data: dict[int, Any] = {}
        self._turns = Turns(args, self._channel, strategy, range(2**31))
        everything = {**self._local.shared, **self._local.local}
        self._facts = node_facts({
            **settings_facts(args, strategy),
            **(given.facts if given else {}),
            **model_facts(everything),
            **base_facts(model, everything),
        })  # fmt: skip

    def introduce(self, client: int) -> Introduction:
        """How many examples a client has, and what this node was given."""
        return Introduction(len(self._dataset(client)), self._facts)

    def train(self, client: int, job: Job) -> Answer:
        """Train a client for a round.

        What the server would refuse changes nothing of what the client keeps.
        """
        store = self._store(client, job)
        try:
            return self._turn(client, job, store)
        except PayloadError as error:  # the broadcast is not what was agreed on
            logger.warning("round %d, client %d: %s", job.round + 1, client, error)
            return Answer(job.round, reason=error.reason, message=str(error))
        finally:
            store.prune([*job.needed, job.kept, job.round + 1])
            store.commit()

    def _turn(self, client: int, job: Job, store: DiskStore) -> Answer:
        resting = frozenset(resting_factors(self._products, job.round))
        local, kept = self._local, store.get(client)
        state = usable_state(kept, local.local, local.shared, client)
        state = self._channel.ranks.own(state, local.first_local, client)
        broadcast, remainders = self._received(client, job, resting, state)
        data = self._dataset(client)

        def train() -> Trained:
            with local.at_work(resting):
                return local.train(client, data, job.round, broadcast, state, resting)

        new = Held()
        outcome = self._turns.take(client, job.round, train, new, encode=True)
        if outcome.refused is None:
            found = new.states.get(client, ClientState())
            if found := replace(found, remainders=at_rest(remainders)):
                store.put(client, job.round + 1, found)
        else:
            logger.warning(
                "round %d, client %d: %s", job.round + 1, client, outcome.refused.message
            )
        if outcome.sent is None:
            assert outcome.refused is not None
            reason, message = outcome.refused.reason, outcome.refused.message
            return Answer(job.round, reason=reason, message=message)
        # Also what the server will refuse is sent, to be counted.
        sent = outcome.sent
        steps = tuple(v for v in astuple(sent.steps) if v is not None) if sent.steps else ()
        return Answer(
            job.round, sent.num_examples, sent.train_loss, outcome.payload, steps, sent.terms
        )

    def _received(
        self, client: int, job: Job, resting: frozenset[str], state: ClientState | None
    ) -> tuple[Broadcast, State]:
        """The broadcast, checked against this node's own model, and the remainders in it."""
        server = replace(self._local.first_server(), round=job.round)
        ranks = self._channel.ranks
        level = ranks.level(client)
        layout = self._channel.layout("downlink", server, resting, level)
        remainders: State = {}
        payload = job.payload
        if (exact := self._exact) is not None:
            caught = exact.told(job.missed, job.round)
            end = len(payload) - len(caught.form.size)
            own = {} if state is None else state.remainders
            remainders = exact.followed(caught, payload[end:], job.round, own)
            payload = payload[:end]
        found = layout.form.decode(payload, job.round) if layout.form.schema else {}
        params, buffers, extra = layout.parted(found, server.params)
        params = {**ranks.padded(params, level), **buffers, **remainders}
        if (job.clip_norm is None) != (server.clip_norm is None):
            raise PayloadError(
                "malformed",
                f"the clipping norm of round {job.round + 1} is {job.clip_norm}: run one version "
                "on both ends",
            )
        extra = ranks.padded_each(extra, level)
        return Broadcast(params, extra, job.clip_norm), remainders

    def _dataset(self, client: int) -> Any:
        if client not in self._data:
            data = self._setup.data_fn(client)
            with about(client):
                examples = count_rows(data)
            if not examples:
                raise ClientDataError(f"client {client} has no data: leave its node out")
            self._data = {client: data}  # of one client at a time
        return self._data[client]

    def _store(self, client: int, job: Job) -> DiskStore:
        """The client's states of this run, as the server knows them."""
        if not _RUN.fullmatch(job.run):
            raise RoundError(f"{job.run!r:.80} is not the name of a run: update the server")
        store = DiskStore(client_folder(self._setup.state_dir, client) / f"run-{job.run}")
        store.rollback(job.kept)
        if self._loses_state(client, job, store.get(client)):
            logger.warning(
                "client %d took part in round %d, but %s has no state of it: starting afresh",
                client, job.kept, store.folder,
            )  # fmt: skip
        return store

    def _loses_state(self, client: int, job: Job, state: ClientState | None) -> bool:
        keeps = bool(self._local.local) or (
            self._setup.args.optimizer_state == "keep" and self._local.optimizers.has_state
        )
        return job.kept > 0 and state is None and keeps


def client_folder(state_dir: str | os.PathLike[str], client: int) -> Path:
    """A client's own folder, which nobody else may read."""
    folder = Path(state_dir) / f"client-{client}"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder
