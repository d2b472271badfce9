"""``FederatedTrainer``: a run in this process, or in those of ``accelerate launch``."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..comm.ledger import Ledger
from ..comm.schema import schema_of
from ..comm.state import State
from ..tuner.layer import factorized_layers
from .arguments import FederatedArguments
from .backends import backend_of
from .client.evaluation import Evaluator, Metrics
from .client.local import LocalTrainer
from .client.optimizer import OptimizerFactory
from .client.stack.engine import BatchedTrainer
from .client.trainers.given import LocalTrainerFactory, given_trainer
from .client.turn import Turns
from .crew import Crew
from .data.batches import Collator
from .data.fingerprint import (
    base_facts,
    data_digest,
    model_facts,
    population_facts,
    settings_facts,
)
from .data.loss import DefaultLoss, LossFunction
from .data.population import Population
from .errors import ArgumentsError
from .folder.checkpoint import write_model
from .folder.history import History
from .late.seconds import GivenSeconds, seconds_of
from .observers.callbacks import FederatedCallback
from .observers.trackers import Trackers
from .precision import Precision
from .run import Run
from .secure.fit import require_possible
from .secure.seal import Sealer
from .server.averaging import ExactAverage
from .server.channel import Channel
from .server.ranks import GivenRanks, ranks_of
from .server.round import RoundServer
from .server.schedule import factor_blocks
from .simulation import Simulation
from .state import ClientState
from .strategies import Strategy, as_strategy

logger = logging.getLogger(__name__)

#: Arguments that may differ between the processes of a run.
_OWN = ("report_to", "disable_tqdm")


class FederatedTrainer:
    """Train a model in a simulated federation.

    Whatever of the model is trainable is federated: a plain module, a transformers model, any PEFT
    adapter. Tensors of local scope (pFedPara's W₂, ``local_modules``) stay with each client, as
    does what the strategy keeps for it. Under ``accelerate launch`` the clients of a round are
    shared among the processes; with ``engine="sequential"`` the result is the same, bit for bit, on
    CPUs with equally many threads.

    Args:
        model: the global model, trained in place.
        args: the run's settings.
        train_dataset: one data set per client, as a sequence or a mapping by client name.
        eval_dataset: examples to evaluate the global model on.
        data_collator: makes a batch from rows; see :func:`~.data.batches.batches` for the default.
        compute_loss: ``(model, batch) -> loss``, ``(loss, logits)`` or ``(loss, logits, terms)``:
            the mean loss, and of how many terms (tokens, say) it is the mean where those are not
            the rows; see :class:`~.data.loss.DefaultLoss` for the default.
        compute_metrics: from an ``EvalPrediction`` to named numbers, or one number, called
            ``metric``; see :func:`~.data.metrics.higher_is_better` for what the names tell.
        strategy: the federated optimizer, or its name (``"scaffold"``); FedAvg by default.
        callbacks: see :class:`~.observers.callbacks.FederatedCallback`; called on the main process.
        client_eval_dataset: one data set per client, in the same order or by the same names, to
            evaluate each client's own model on (the global model and its local tensors).
        optimizer: the clients', in place of ``args.optim``: a class such as ``torch.optim.AdamW``,
            or what makes an optimizer from a list of parameter groups (a ``functools.partial`` of a
            class, a function). The groups carry the learning rate of the round.
        client_ranks: how many columns of every factor each client trains: a number, or a share in
            (0, 1]; by client name, in order, or as a function of the name. All by default; see
            :mod:`~.server.ranks`.
        local_trainer: what trains a client in place of this trainer's own steps: transformers'
            ``Trainer``, trl's ``SFTTrainer`` or the like with its ``args`` (a
            ``functools.partial``), or ``(model, dataset, client, round) -> trainer``; see
            :class:`~.client.trainers.given.GivenTrainer`.
        client_seconds: how long each client takes for a turn, transfers included: by client name,
            in order, or as a function of the name. It gives reports a simulated clock, and with
            ``args.buffer_size`` it says who is late.

    Attributes:
        history: reports of the last run's rounds.
        ledger: transfers of the last run.

    Raises:
        ClientDataError: there are no clients, or one has no data.
        ArgumentsError: the arguments do not fit the clients or the model.
    """

    def __init__(
        self,
        model: nn.Module,
        args: FederatedArguments,
        train_dataset: Sequence[Any] | Mapping[Any, Any],
        eval_dataset: Any = None,
        data_collator: Collator | None = None,
        compute_loss: LossFunction | None = None,
        compute_metrics: Metrics | None = None,
        strategy: Strategy | type[Strategy] | str | None = None,
        callbacks: Sequence[FederatedCallback] | None = None,
        client_eval_dataset: Sequence[Any] | Mapping[Any, Any] | None = None,
        optimizer: OptimizerFactory | None = None,
        client_ranks: GivenRanks | None = None,
        local_trainer: LocalTrainerFactory | None = None,
        client_seconds: GivenSeconds | None = None,
    ) -> None:
        _check_given(args)
        self.args = args
        self.strategy = as_strategy(strategy)
        self.callbacks = list(callbacks or ())
        self.accelerator = Accelerator(project_dir=args.output_dir)
        self._trackers = Trackers(self.accelerator, args)
        self._crew = crew = Crew(self.accelerator)
        self.population = Population(train_dataset, client_eval_dataset)
        self.eval_dataset = eval_dataset
        self.model = model.to(self.accelerator.device)
        facts = settings_facts(args, self.strategy)
        if crew.size > 1:
            self._agree(facts)
        if compute_metrics and args.eval_every and eval_dataset is client_eval_dataset is None:
            raise ArgumentsError(
                "compute_metrics has nothing to evaluate: give eval_dataset or "
                "client_eval_dataset, or eval_every=0 to call evaluate(dataset) yourself"
            )
        if args.metric_for_best_model and eval_dataset is client_eval_dataset is None:
            raise ArgumentsError(
                f"metric_for_best_model={args.metric_for_best_model!r} has nothing to be evaluated "
                "on: give eval_dataset or client_eval_dataset"
            )
        loss = compute_loss or DefaultLoss(args.label_column)
        if local_trainer is not None and optimizer is not None:
            raise ArgumentsError("give optimizer or local_trainer, which has its own, not both")
        given = given_trainer(local_trainer, self.model, args, self.strategy)
        self._local = local = LocalTrainer(
            self.model, args, self.accelerator, self.strategy, loss, data_collator,
            self.population.names, optimizer, given,
        )  # fmt: skip
        of_steps = given.facts if given else local.optimizers.facts
        facts |= of_steps
        crew.agree(lambda: of_steps)
        self._evaluator = Evaluator(
            self.accelerator, Precision.of(args.mixed_precision, self.accelerator),
            args.eval_batch_size, loss, compute_metrics, data_collator, args.label_column,
            args.seed,
        )  # fmt: skip
        names = self.population.names
        self._ranks = ranks = ranks_of(model, args, self.strategy, client_ranks, names)
        seconds = seconds_of(client_seconds, args, names)
        ranks_facts = ranks.facts(range(len(names))) | (seconds.facts if seconds else {})
        crew.agree(lambda: ranks_facts)
        self._channel = Channel(args, self.strategy, ranks)
        if args.secure_aggregation:
            require_possible(
                args, self.strategy, args.cohort_size(len(names)), schema_of(local.shared),
                sorted(local.buffers), ranks=client_ranks is not None, processes=crew.size,
            )  # fmt: skip
        sealer = Sealer(args) if args.secure_aggregation else None
        self._simulation = Simulation(
            args, self.population, local, None if given else self._stacked_engine(loss),
            Turns(args, self._channel, self.strategy, names, sealer), self._evaluator, crew, ranks,
        )  # fmt: skip
        rounds = RoundServer(
            args,
            self.strategy,
            self._channel,
            self.population.num_examples,
            local.first_server(),
            factor_blocks(model, args.factor_schedule),
            names,
            ExactAverage(model, local.first_server()) if args.exact_average else None,
            seconds,
        )
        backend = backend_of(
            args, self.strategy, self._simulation, rounds, self.accelerator, crew, sealer
        )
        trained = {**local.shared, **local.local}
        self._run = Run(
            args, self.strategy, backend, rounds, local, crew, self._trackers,
            self.callbacks, None if eval_dataset is None else self.evaluate,
            {**facts, **ranks_facts, **model_facts(trained), **base_facts(model, trained)},
        )  # fmt: skip

    @property
    def history(self) -> History:
        """Reports of the rounds so far."""
        return self._run.history

    def _repr_html_(self) -> str:
        name = escape(
            f"{type(self).__name__} of {type(self.model).__name__}, {self.args.output_dir}"
        )
        return f"<p>{name}</p>\n{self.history._repr_html_()}"

    @property
    def ledger(self) -> Ledger:
        """Transfers of the rounds so far."""
        return self._run.ledger

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None) -> History:
        """Run all rounds; the model holds the global state afterwards: the last one, or the best.

        A resumed run ends in the same state, bit for bit, as one that was never interrupted.

        Args:
            resume_from_checkpoint: True continues from the newest checkpoint in ``output_dir``, or
                starts afresh where there is none and says so; a path, which is in ``output_dir``,
                continues from that one, and newer ones are removed.

        Returns:
            The history, also written to ``output_dir/history.json``; the settings are in
            ``settings.json`` beside it.

        Raises:
            RoundError: a client's training diverged; the model holds the last good global state.
            ResumeError: the checkpoint is of another run, or starting afresh would overwrite one.
        """
        return self._run.train(resume_from_checkpoint)

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Evaluate the model in place; several processes do it together.

        Args:
            dataset: examples; the trainer's ``eval_dataset`` by default.

        Returns:
            ``eval_loss`` and, where ``compute_metrics`` is given, its numbers as ``eval_<name>``.

        Raises:
            ArgumentsError: there is nothing to evaluate on, or metrics need outputs that
                ``compute_loss`` does not return.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        found = self._evaluator(self.model, dataset, self._crew)
        return {f"eval_{name}": value for name, value in found.items()}

    def client_state(self, client: Any) -> ClientState | None:
        """What a client keeps between its rounds, None if it has never trained.

        It is that of the round whose global state is in place: the last one, or the best.

        Args:
            client: its name (a key of ``train_dataset``) or index.

        Raises:
            ClientDataError: there is no such client.
        """
        at = self._run.round if len(self.history) else None
        return self._simulation.store.get(self.population.index(client), at)

    def client_model(self, client: Any) -> nn.Module:
        """A client's own model: a copy of the global model with the client's local tensors.

        Args:
            client: its name (a key of ``train_dataset``) or index.

        Returns:
            A copy; ``merge_and_unload()`` and ``save_local`` work on it as on any model.

        Raises:
            ClientDataError: there is no such client.
        """
        state = self.client_state(client)
        here: State = {**self._local.shared, **self._local.local}
        kept = {name: tensor.clone() for name, tensor in here.items()}
        shared = {name: kept[name] for name in self._local.shared}
        index = self.population.index(client)
        shared = self._ranks.only(shared, self._ranks.level(index))
        self._local.load(shared, self._ranks.own(state, self._local.first_local, index))
        personal = copy.deepcopy(self.model)
        for name, tensor in here.items():
            tensor.copy_(kept[name])
        if state is not None:
            for _, layer in factorized_layers(personal):
                for adapter in layer.specs:
                    layer.keep_local_half(adapter)
        return personal

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the model in place: an adapter folder, a transformers folder, or safetensors.

        Of several processes the first writes, and all go on when it has.

        Args:
            output_dir: where to; ``args.output_dir`` by default.
        """
        folder = output_dir or self.args.output_dir
        self._crew.on_main(lambda: write_model(self.model, folder))

    def _agree(self, facts: Mapping[str, Any]) -> None:
        """See that all processes were given one run, and start it from one model."""
        held_out = [] if self.eval_dataset is None else [self.eval_dataset]
        population = self.population
        self._crew.agree(lambda: {n: v for n, v in facts.items() if n not in _OWN})
        self._crew.agree(
            lambda: {
                **population_facts(population.names, population.num_examples, population.train),
                "eval_dataset": [*map(len, held_out), data_digest(held_out)],
            }
        )
        self._crew.share_model(self.model)
        self._crew.share_threads()
        if self.args.client_store == "memory":
            raise ArgumentsError(
                "client_store='memory' needs one process, because a client may train on any: use "
                "'disk' or 'auto'"
            )

    def _stacked_engine(self, loss: LossFunction) -> BatchedTrainer | None:
        if self.args.engine == "sequential":
            return None
        stacked = BatchedTrainer(self._local, self.args, self.accelerator, loss)
        obstacle = stacked.obstacle()
        if obstacle is not None and self.args.engine == "batched":
            raise ArgumentsError(
                f"engine='batched' is not possible: {obstacle}; use engine='sequential'"
            )
        if (unfit := self._local.optimizers.obstacle()) and stacked.wanted(
            self.args.cohort_size(len(self.population))
        ):
            logger.warning("clients train one after the other: %s", unfit)
        return None if obstacle is not None else stacked


def _check_given(args: Any) -> None:
    if not isinstance(args, FederatedArguments):
        hint = "FederatedArguments(**args)" if isinstance(args, Mapping) else "FederatedArguments"
        raise ArgumentsError(f"args is a {type(args).__name__}: give {hint}")
