"""``server_app`` and ``client_app``: the two halves of a Flower app."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import nn

from ...comm.errors import PayloadError
from ...federation.arguments import FederatedArguments
from ...federation.client.evaluation import Metrics
from ...federation.client.trainers.given import LocalTrainerFactory
from ...federation.data.batches import Collator
from ...federation.data.loss import LossFunction
from ...federation.errors import ArgumentsError
from ...federation.observers.callbacks import FederatedCallback
from ...federation.server.ranks import GivenRanks
from ...federation.strategies import Strategy
from ..engine.jobs import Answer
from ..engine.node import Node, NodeSetup
from ..engine.server import FederationServer, ServerSetup
from .backend import FlowerBackend, logger
from .late import LateNodes
from .messages import answer_record, introduction_record, read_job
from .worker import RemoteNode

#: Settings, or how to make them from the app's run configuration (``flwr run --run-config``).
Arguments = FederatedArguments | Callable[[Mapping[str, Any]], FederatedArguments]


def server_app(
    model_fn: Callable[[], nn.Module],
    args: Arguments,
    num_clients: int,
    *,
    strategy: Strategy | type[Strategy] | str | None = None,
    compute_loss: LossFunction | None = None,
    data_collator: Collator | None = None,
    eval_data_fn: Callable[[], Any] | None = None,
    compute_metrics: Metrics | None = None,
    callbacks: Sequence[FederatedCallback] = (),
    deadline_s: float = 600.0,
    resume: bool = True,
    client_ranks: GivenRanks | None = None,
    local_trainer: LocalTrainerFactory | None = None,
) -> ServerApp:
    """The server of a federation.

    It waits up to the deadline for ``num_clients`` nodes, one a client, and goes on with those
    that came. A round ends when all sampled clients have answered or the deadline has passed;
    ``args.quorum`` says how many updates it needs.

    Args:
        model_fn: makes the model; seed it, so that all nodes and the server make the same.
        args: the run's settings, or a function of Flower's run configuration. ``output_dir`` gets
            checkpoints, ``history.json``, ``ledger.npy`` and the folder ``model``.
        num_clients: the population.
        strategy: the federated optimizer; FedAvg by default.
        compute_loss: ``(model, batch) -> loss``, ``(loss, logits)`` or ``(loss, logits, terms)``.
        data_collator: makes a batch from rows.
        eval_data_fn: examples to evaluate the global model on.
        compute_metrics: from an ``EvalPrediction`` to named numbers.
        callbacks: called on the server.
        deadline_s: seconds that a round waits for answers.
        resume: continue from the newest checkpoint in ``output_dir``, if there is one.
        client_ranks: how many columns of every factor each client trains, by client index; what
            its node says must be the same, or what it sends is refused.
        local_trainer: what trains the clients on their nodes; here it trains nobody, and a node
            that was given another is refused.
    """
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        setup = ServerSetup(
            model_fn,
            _resolved(args, context),
            num_clients,
            strategy,
            compute_loss,
            data_collator,
            eval_data_fn,
            compute_metrics,
            callbacks,
            deadline_s,
            resume,
            client_ranks,
            local_trainer,
        )
        kind = FlowerBackend if setup.args.buffer_size is None else LateNodes
        FederationServer(setup).run(
            lambda rounds, num_examples, expected: kind(
                grid, setup.args, rounds, num_examples, deadline_s, expected
            ),
            logger,
        )

    app.main()(main)
    return app


def client_app(
    model_fn: Callable[[], nn.Module],
    data_fn: Callable[[int], Any],
    args: Arguments,
    state_dir: str | None = None,
    *,
    strategy: Strategy | type[Strategy] | str | None = None,
    compute_loss: LossFunction | None = None,
    data_collator: Collator | None = None,
    worker: bool = False,
    worker_idle_s: float = 600.0,
    client_ranks: GivenRanks | None = None,
    local_trainer: LocalTrainerFactory | None = None,
) -> ClientApp:
    """A client of a federation, on its node.

    Client index i is the node's ``partition-id`` (``flower-supernode --node-config
    'partition-id=3'``). What the client keeps between rounds (pFedPara's local half, SCAFFOLD's
    control, residuals) is written to the node's folder and never leaves it.

    Args:
        model_fn: makes the model, the server's own.
        data_fn: a client's examples, by client index.
        args: the run's settings, the server's own, or a function of Flower's run configuration.
        state_dir: the node's folder; ``state-dir`` in the node's configuration goes before it.
        strategy: the federated optimizer, the server's own.
        compute_loss: ``(model, batch) -> loss``, ``(loss, logits)`` or ``(loss, logits, terms)``.
        data_collator: makes a batch from rows.
        worker: train in a process that stays alive between messages, so that torch, model and data
            are loaded once; Flower starts a new process for every message.
        worker_idle_s: seconds without a message after which that process ends.
        client_ranks: how many columns of every factor the node's client trains, by client index.
        local_trainer: what trains the client, the server's own: transformers' ``Trainer``, trl's
            ``SFTTrainer`` or the like with its ``args`` (a ``functools.partial``), or
            ``(model, dataset, client, round) -> trainer``.
    """
    app = ClientApp()
    made: list[tuple[NodeSetup, Node]] = []

    def node(context: Context) -> Node | RemoteNode:
        folder = context.node_config.get("state-dir", state_dir)
        if folder is None:
            raise ArgumentsError(
                "the node has no folder for what its client keeps: give state_dir, or "
                "--node-config 'state-dir=\"/a/folder\"'"
            )
        setup = NodeSetup(
            model_fn,
            data_fn,
            _resolved(args, context),
            str(folder),
            strategy,
            compute_loss,
            data_collator,
            client_ranks,
            local_trainer,
        )
        if worker:
            return RemoteNode(setup, worker_idle_s)
        if not made or made[0][0] != setup:
            made[:] = [(setup, Node(setup))]
        return made[0][1]

    def query(message: Message, context: Context) -> Message:
        client = _client(context)
        own = node(context).introduce(client)
        record = introduction_record(client, own.num_examples, own.facts)
        return Message(record, reply_to=message)

    def train(message: Message, context: Context) -> Message:
        try:
            answer = node(context).train(_client(context), read_job(message.content))
        except PayloadError as error:
            answer = Answer(0, reason=error.reason, message=str(error))
        return Message(answer_record(answer), reply_to=message)

    app.query()(query)
    app.train()(train)
    return app


def _resolved(args: Arguments, context: Context) -> FederatedArguments:
    found = args if isinstance(args, FederatedArguments) else args(context.run_config)
    return dataclasses.replace(found)


def _client(context: Context) -> int:
    client = context.node_config.get("partition-id")
    if not isinstance(client, int) or isinstance(client, bool) or client < 0:
        raise ArgumentsError(
            f"the node's partition-id is {client!r}: start it with --node-config 'partition-id=0', "
            "a number of its own for each node"
        )
    return client
