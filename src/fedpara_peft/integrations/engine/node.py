"""What a node does with a message: it trains its client, and keeps the client's state on disk."""

from __future__ import annotations

import functools
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

from ...comm.errors import PayloadError, SecureAggregationError
from ...comm.schema import Schema, schema_of
from ...comm.secure.messages import Kind
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
from ...federation.secure.fit import require_possible
from ...federation.secure.seal import names_of
from ...federation.server.admission import usable_state
from ...federation.server.averaging import ExactAverage
from ...federation.server.channel import Channel
from ...federation.server.privacy import require_protected
from ...federation.server.ranks import GivenRanks, ranks_of
from ...federation.server.round import require_fit
from ...federation.server.schedule import factor_blocks, resting_factors
from ...federation.state import Broadcast, ClientState
from ...federation.strategies import Strategy, as_strategy
from .jobs import Answer, Introduction, Job
from .sums import NodeSums

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
        given = given_trainer(setup.local_trainer, model, args, strategy)
        self._local = LocalTrainer(
            model, args, accelerator, strategy, loss, setup.data_collator, given=given
        )
        self._products = factor_blocks(model, args.factor_schedule)
        first = self._local.first_server()
        self._exact = ExactAverage(model, first) if args.exact_average else None
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
        state = usable_state(kept, local.local, local.shared, client)
        state = self._channel.ranks.own(state, local.first_local, client)
        broadcast, remainders = self._received(client, job, resting, state)
        data = self._dataset(client)

        def train() -> Trained:
            with local.at_work(resting):
                return local.train(client, data, job.round, broadcast, state, resting)

        new = Held()
        outcome = self._turns.take(
            client, job.round, train, new, encode=not job.wants,
            noise_seed=self._setup.args.dp_noise_seed,
        )  # fmt: skip
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
        if job.wants:  # and nothing beside it: the sum has the loss, too
            return Answer(job.round, payload=outcome.payload)
        # Also what the server will refuse is sent, to be counted.
        sent = outcome.sent
        steps = tuple(v for v in astuple(sent.steps) if v is not None) if sent.steps else ()
        return Answer(
            job.round, sent.num_examples, sent.train_loss, outcome.payload, steps, sent.terms
        )

    def _schema(self, round: int) -> Schema:
        """Of a round's updates, in the order in which they are summed."""
        shared, resting = self._local.shared, resting_factors(self._products, round)
        server = replace(self._local.first_server(), round=round)
        sent = self._channel.layout("uplink", server, frozenset(resting)).params
        return schema_of({name: shared[name] for name in names_of(list(sent))})

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
