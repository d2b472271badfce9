"""The run on the server: the trainer's own, with nodes in place of simulated clients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ...comm.schema import schema_of
from ...federation.arguments import FederatedArguments
from ...federation.client.evaluation import Evaluator, Metrics
from ...federation.client.local import LocalTrainer
from ...federation.client.trainers.given import LocalTrainerFactory, given_trainer
from ...federation.crew import Crew
from ...federation.data.batches import Collator
from ...federation.data.fingerprint import base_facts, model_facts, settings_facts
from ...federation.data.loss import DefaultLoss, LossFunction
from ...federation.errors import ArgumentsError
from ...federation.folder.checkpoint import write_model
from ...federation.folder.history import History
from ...federation.observers.callbacks import FederatedCallback
from ...federation.observers.trackers import Trackers
from ...federation.precision import Precision
from ...federation.run import Run
from ...federation.secure.fit import require_possible
from ...federation.server.averaging import ExactAverage
from ...federation.server.channel import Channel
from ...federation.server.ranks import GivenRanks, ranks_of
from ...federation.server.round import RoundServer
from ...federation.server.schedule import factor_blocks
from ...federation.strategies import Strategy, as_strategy
from .node import node_facts
from .secure import Messenger, SecureNodes

#: Makes the clients of a run from what decodes their payloads, the list of their numbers of
#: examples (to be filled in), and what every node must have been given, by name.
BackendOf = Callable[[RoundServer, list[int], Mapping[str, Any]], Messenger]


@dataclass(frozen=True)
class ServerSetup:
    """What a server brings along.

    Attributes:
        model_fn: makes the model; seed it, so that all nodes and the server make the same.
        args: the run's settings; ``output_dir`` gets checkpoints, history, ledger and model.
        num_clients: the population; every client is a node of its own.
        strategy: the federated optimizer; FedAvg by default.
        compute_loss: ``(model, batch) -> loss``, ``(loss, logits)`` or ``(loss, logits, terms)``.
        data_collator: makes a batch from rows.
        eval_data_fn: examples to evaluate the global model on.
        compute_metrics: from an ``EvalPrediction`` to named numbers.
        callbacks: called on the server.
        deadline_s: how long a round waits for answers, and its beginning for nodes.
        resume: continue from the newest checkpoint in ``output_dir``, if there is one.
        client_ranks: how many columns each client trains, as its node has it; see
            :mod:`~fedpara_peft.federation.server.ranks`.
        local_trainer: what trains the clients on their nodes, as each of these has it; here it
            trains nobody, and a node that was given another is refused.
    """

    model_fn: Callable[[], nn.Module]
    args: FederatedArguments
    num_clients: int
    strategy: Strategy | type[Strategy] | str | None = None
    compute_loss: LossFunction | None = None
    data_collator: Collator | None = None
    eval_data_fn: Callable[[], Any] | None = None
    compute_metrics: Metrics | None = None
    callbacks: Sequence[FederatedCallback] = ()
    deadline_s: float = 600.0
    resume: bool = True
    client_ranks: GivenRanks | None = None
    local_trainer: LocalTrainerFactory | None = None


class FederationServer:
    """Runs all rounds; see :class:`ServerSetup`.

    Raises:
        ArgumentsError: the arguments do not fit the clients or the model.
    """

    def __init__(self, setup: ServerSetup) -> None:
        if not setup.deadline_s > 0:
            raise ArgumentsError(f"deadline_s must be positive, got {setup.deadline_s}")
        if setup.num_clients < 1:
            raise ArgumentsError(f"num_clients must be at least 1, got {setup.num_clients}")
        if setup.compute_metrics and setup.args.eval_every and not setup.eval_data_fn:
            raise ArgumentsError("compute_metrics has nothing to evaluate: give eval_data_fn")
        if setup.args.metric_for_best_model and not setup.eval_data_fn:
            raise ArgumentsError("metric_for_best_model has nothing to evaluate: give eval_data_fn")
        if setup.args.unmask_drop_out_probability:
            raise ArgumentsError(
                "unmask_drop_out_probability is of a simulation: nodes drop out by themselves"
            )
        if setup.args.client_seconds_sigma:
            raise ArgumentsError(
                "client_seconds_sigma is of a simulated clock: nodes take their time"
            )
        self._setup = setup
        args, self._strategy = setup.args, as_strategy(setup.strategy)
        self._accelerator = accelerator = Accelerator(project_dir=args.output_dir)
        self._trackers = Trackers(accelerator, args)
        self._model = setup.model_fn().to(accelerator.device)
        loss, collator = setup.compute_loss or DefaultLoss(args.label_column), setup.data_collator
        self._given = given_trainer(setup.local_trainer, self._model, args, self._strategy)
        self._local = local = LocalTrainer(
            self._model, args, accelerator, self._strategy, loss, collator, given=self._given
        )
        self._evaluator = Evaluator(
            accelerator, Precision.of(args.mixed_precision, accelerator), args.eval_batch_size,
            loss, setup.compute_metrics, collator, args.label_column, args.seed,
        )  # fmt: skip
        self._eval_data = setup.eval_data_fn() if setup.eval_data_fn else None
        clients = range(setup.num_clients)
        self._ranks = ranks_of(self._model, args, self._strategy, setup.client_ranks, clients)
        self._rank_facts = self._ranks.facts(clients)
        if args.secure_aggregation:
            require_possible(
                args, self._strategy, args.cohort_size(len(clients)), schema_of(local.shared),
                sorted(local.buffers), ranks=setup.client_ranks is not None,
            )  # fmt: skip

    def run(self, clients: BackendOf, logger: logging.Logger) -> History:
        """Run all rounds with the clients of an engine.

        Args:
            clients: makes the engine's backend.
            logger: where every round is told in a line.

        Raises:
            RoundError: too few updates of a round could be used.
            ResumeError: the checkpoint is of another run, or starting afresh would overwrite one.
            AgreementError: the nodes were given another run than the server.
        """
        setup, local = self._setup, self._local
        args, strategy = setup.args, self._strategy
        everything = {**local.shared, **local.local}
        of_steps = self._given.facts if self._given else {}
        facts = {**settings_facts(args, strategy), **of_steps, **model_facts(everything)}
        num_examples = [1] * setup.num_clients  # until the nodes have said how many
        rounds = RoundServer(
            args,
            strategy,
            Channel(args, strategy, self._ranks),
            num_examples,
            local.first_server(),
            factor_blocks(self._model, args.factor_schedule),
            exact=ExactAverage(self._model, local.first_server()) if args.exact_average else None,
        )
        expected = node_facts({**facts, **base_facts(self._model, everything)})
        facts |= self._rank_facts  # of which a node knows its own client's
        nodes = clients(rounds, num_examples, expected)
        backend = SecureNodes(args, strategy, nodes) if args.secure_aggregation else nodes
        run = Run(
            args, strategy, backend, rounds, local, Crew(self._accelerator), self._trackers,
            setup.callbacks, None if self._eval_data is None else self._evaluate, facts, logger,
        )  # fmt: skip
        try:
            return run.train(setup.resume)
        finally:  # also of a run that must stop: the last good global model
            if len(run.history):
                write_model(self._model, Path(args.output_dir) / "model")

    def _evaluate(self) -> dict[str, float]:
        found = self._evaluator(self._model, self._eval_data)
        return {f"eval_{name}": value for name, value in found.items()}
