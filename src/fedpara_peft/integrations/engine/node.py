"""What a node does with a message: it trains its client, and keeps the client's state on disk."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ...comm.errors import PayloadError, SecureAggregationError
from ...comm.schema import Schema, schema_of
from ...comm.secure.messages import Kind
from ...federation.arguments import FederatedArguments
from ...federation.client.local import LocalTrainer, Trained
from ...federation.client.turn import Turns
from ...federation.data.batches import Collator, count_rows
from ...federation.data.fingerprint import base_facts, model_facts, settings_facts
from ...federation.data.loss import DefaultLoss, LossFunction
from ...federation.errors import ClientDataError, RoundError, about
from ...federation.folder.checkpoint import must_agree
from ...federation.folder.store import DiskStore
from ...federation.secure.fit import require_possible
from ...federation.secure.seal import names_of
from ...federation.server.admission import usable_state
from ...federation.server.channel import Channel
from ...federation.server.privacy import require_protected
from ...federation.server.ranks import GivenRanks, ranks_of
from ...federation.server.round import require_fit
from ...federation.server.schedule import factor_blocks, resting_factors
from ...federation.state import Broadcast, ClientState, ServerState
from ...federation.strategies import Strategy, as_strategy
from .sums import NodeSums

logger = logging.getLogger(__name__)

#: Arguments that only the server reads.
_SERVERS = {
    "client_fraction", "clients_per_round", "client_sampling", "drop_out_probability",
    "aggregation", "quorum", "dp_noise_multiplier", "dp_noise_seed", "dp_delta", "engine",
    "buffer_size", "concurrency", "max_staleness", "staleness_exponent", "client_seconds_sigma",
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
    """

    model_fn: Callable[[], nn.Module]
    data_fn: Callable[[int], Any]
    args: FederatedArguments
    state_dir: str
    strategy: Strategy | type[Strategy] | str | None = None
    compute_loss: LossFunction | None = None
    data_collator: Collator | None = None
    client_ranks: GivenRanks | None = None


@dataclass(frozen=True)
class Job:
    """A round as a client sees it.

    Attributes:
        run: the run's own name; a client's states of several runs do not mix.
        round: rounds completed.
        kept: the version of the client's state that goes with the server's: the last round in which
            its update was used. What the client learnt after it is forgotten.
        needed: rounds to which the server may return.
        payload: the broadcast; empty where no training is asked for.
        wants: with secure aggregation the message that is asked for, as
            :class:`~fedpara_peft.comm.secure.messages.Kind` has it; empty: an update in the clear.
        cohort: the round's clients, with the first such message.
        message: what the client is told for it.
    """

    run: str
    round: int
    kept: int
    needed: tuple[int, ...]
    payload: bytes
    wants: str = ""
    cohort: tuple[int, ...] = ()
    message: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What a client sends.

    Attributes:
        round: rounds completed before it.
        num_examples: its examples.
        train_loss: mean loss over its local steps.
        payload: its update, or the message that was asked for; empty if there is none.
        steps: how it trained, where the strategy asks for it: the fields of
            :class:`~fedpara_peft.federation.state.LocalSteps`, without a weight that is not known.
        reason: why there is none.
        message: what was found, and what helps.
    """

    round: int
    num_examples: int = 0
    train_loss: float = 0.0
    payload: bytes = b""
    steps: tuple[float, ...] = ()
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
    # Where nodes add the noise, they must know how much.
    servers = _SERVERS - ({"dp_noise_multiplier"} if facts["dp_mode"] != "central" else set())
    shaping = {n: v for n, v in must_agree(facts).items() if n not in servers}
    return json.loads(json.dumps(shaping))


class Node:
    """Trains clients in one model, which is never rebuilt.

    Args:
        setup: model, data and settings.
    """

    def __init__(self, setup: NodeSetup) -> None:
        self._setup = setup
        args, strategy = setup.args, as_strategy(setup.strategy)
        accelerator = Accelerator()
        model = setup.model_fn().to(accelerator.device)
        loss = setup.compute_loss or DefaultLoss(args.label_column)
        self._strategy = strategy
        ranks = ranks_of(model, args, strategy, setup.client_ranks, None)
        self._channel = Channel(args, strategy, ranks)
        self._local = LocalTrainer(model, args, accelerator, strategy, loss, setup.data_collator)
        self._products = factor_blocks(model, args.factor_schedule)
        self._data: dict[int, Any] = {}
        self._sums: NodeSums | None = None
        if args.secure_aggregation:
            shared, buffers = schema_of(self._local.shared), sorted(self._local.buffers)
            ranked = setup.client_ranks is not None
            require_possible(args, strategy, None, shared, buffers, ranks=ranked)
            folder_of = functools.partial(client_folder, setup.state_dir)
            self._sums = NodeSums(args, strategy, folder_of, self._schema)
        if args.noise_mode == "local":
            require_fit(strategy, args)
            uplink = self._channel.layout("uplink", self._local.first_server())
            require_protected(sorted({*self._local.buffers, *uplink.groups}))
        sealer = self._sums.sealer if self._sums else None
        self._turns = Turns(args, self._channel, strategy, range(2**31), sealer)
        everything = {**self._local.shared, **self._local.local}
        self._facts = node_facts({
            **settings_facts(args, strategy),
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
        if self._sums is None and not job.wants:
            return self._trained(client, job)
        try:
            return self._secure(client, job)
        except (PayloadError, SecureAggregationError) as error:
            logger.warning("round %d, client %d: %s", job.round + 1, client, error)
            reason = error.reason if isinstance(error, PayloadError) else "failed"
            return Answer(job.round, reason=reason, message=str(error))

    def _secure(self, client: int, job: Job) -> Answer:
        """A message of a round whose updates the server sees the sum of."""
        sums = self._sums
        if sums is None or not job.wants:
            raise PayloadError(
                "malformed",
                f"{job.wants or 'an update in the clear'} is asked for, but this node has "
                f"secure_aggregation={sums is not None}: give both ends the same arguments",
            )
        if job.wants != Kind.MASKED.name:
            return Answer(job.round, payload=sums.answer(client, job))
        with sums.masking(client, job):
            return self._trained(client, job)

    def _trained(self, client: int, job: Job) -> Answer:
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
        broadcast = self._received(client, job, resting)
        state = usable_state(kept, local.local, local.shared, client)
        state = self._channel.ranks.own(state, local.first_local, client)
        data = self._dataset(client)

        def train() -> Trained:
            with local.at_work(resting):
                return local.train(client, data, job.round, broadcast, state, resting)

        outcome = self._turns.take(
            client, job.round, train, store, encode=not job.wants,
            noise_seed=self._setup.args.dp_noise_seed,
        )  # fmt: skip
        if outcome.refused is not None:
            logger.warning(
                "round %d, client %d: %s", job.round + 1, client, outcome.refused.message
            )
        if outcome.sent is None:
            assert outcome.refused is not None
            reason, message = outcome.refused.reason, outcome.refused.message
            return Answer(job.round, reason=reason, message=message)
        if job.wants:  # and nothing beside it: the sum has the loss, too
            return Answer(job.round, payload=outcome.payload)
        # Also what the server will refuse is sent, to be counted.
        sent = outcome.sent
        steps = tuple(v for v in astuple(sent.steps) if v is not None) if sent.steps else ()
        return Answer(job.round, sent.num_examples, sent.train_loss, outcome.payload, steps)

    def _schema(self, round: int) -> Schema:
        """Of a round's updates, in the order in which they are summed."""
        shared, resting = self._local.shared, resting_factors(self._products, round)
        server = ServerState(round, shared, buffers=self._local.buffers)
        sent = self._channel.layout("uplink", server, frozenset(resting)).params
        return schema_of({name: shared[name] for name in names_of(list(sent))})

    def _received(self, client: int, job: Job, resting: frozenset[str]) -> Broadcast:
        """The broadcast, checked against this node's own model."""
        shared = self._local.shared
        server = ServerState(job.round, shared, buffers=self._local.buffers)
        ranks = self._channel.ranks
        level = ranks.level(client)
        layout = self._channel.layout("downlink", server, resting, level)
        found = layout.form.decode(job.payload, job.round) if layout.form.schema else {}
        params, buffers, extra = layout.parted(found, shared)
        params = ranks.padded(params, level)
        return Broadcast({**params, **buffers}, ranks.padded_each(extra, level))

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
