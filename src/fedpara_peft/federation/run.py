"""The run, once: open → outcomes → close → evaluate → checkpoint, whoever the clients are."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..comm.ledger import Ledger
from ..tuner.card import note_training
from ..tuner.scope import merged_but_trainable
from .arguments import FederatedArguments
from .backend import Backend
from .client.evaluation import over_clients
from .client.local import LocalTrainer
from .crew import Crew
from .data.metrics import higher_is_better
from .errors import ArgumentsError
from .folder.checkpoint import Checkpoint
from .folder.facts import training_facts
from .folder.history import History
from .folder.run_folder import RunFolder
from .folder.settings import describe_run
from .observers.best import Best
from .observers.callbacks import Callbacks, FederatedCallback
from .observers.control import FederatedControl
from .observers.log import tell_round
from .observers.progress import Progress, progress
from .observers.trackers import Trackers
from .play import play
from .server.opened import OpenRound
from .server.privacy import noise_seed
from .server.round import RoundServer
from .state import RoundReport, ServerState, placed_like
from .strategies import Strategy

logger = logging.getLogger(__name__)


class Run:
    """All rounds of a run.

    Args:
        args: the run's settings.
        strategy: the federated optimizer.
        backend: where clients train.
        rounds: the server's half of a round.
        local: the model's tensors, live.
        crew: the processes that run this together.
        trackers: where it is told to.
        callbacks: called on the main process, which asks for all what they ask.
        evaluate: evaluates the model in place, after it got the global state; None: nothing to.
        facts: what the run was given, to compare with a checkpoint's.
        log: where every round is told in a line; None shows bars instead.

    Attributes:
        history: reports of the rounds so far.
        ledger: their transfers.
    """

    def __init__(
        self,
        args: FederatedArguments,
        strategy: Strategy,
        backend: Backend,
        rounds: RoundServer,
        local: LocalTrainer,
        crew: Crew,
        trackers: Trackers,
        callbacks: Sequence[FederatedCallback],
        evaluate: Callable[[], dict[str, float]] | None,
        facts: Mapping[str, Any],
        log: logging.Logger | None = None,
    ) -> None:
        self._args = args
        self._strategy = strategy
        self._backend = backend
        self._rounds = rounds
        self._local = local
        self._crew = crew
        self._trackers = trackers
        self._callbacks = Callbacks(callbacks)
        self._evaluate = evaluate
        self._facts = facts
        self._logger = log
        self._folder = RunFolder(args)
        self._server = local.first_server()
        self._best = Best.before(args)
        self._stopped = False
        self.history = History()
        self.ledger = Ledger()

    @property
    def model(self) -> nn.Module:
        """The model, in place."""
        return self._local.model

    @property
    def round(self) -> int:
        """The round whose global state is in place: the last one, or the best one at the end."""
        return self._server.round

    def train(self, resume: bool | str | os.PathLike[str] | None = None) -> History:
        """Run all rounds; the model holds the last good global state afterwards, come what may.

        With ``load_best_model_at_end`` it is the best one of a run that came to its end.

        Args:
            resume: see :meth:`~.trainer.FederatedTrainer.train`.

        Raises:
            ArgumentsError: the model is merged.
            RoundError: too few updates of a round can be used.
            ResumeError: the checkpoint is of another run, or starting afresh would overwrite one.
            RunFolderError: the folder cannot be written, or another run has it.
        """
        if (factor := merged_but_trainable(self.model)) is not None:
            raise ArgumentsError(
                f"{factor} is merged into its weight and would not train: unmerge_adapter() first"
            )
        with self._folder.held(self._crew):
            self._start(resume)
            return self._trained()

    def _trained(self) -> History:
        args = self._args
        self._stopped = self._crew.on_main(self._began) or self._best.is_final
        disable = args.disable_tqdm or not self._crew.is_main or self._logger is not None
        try:
            with progress(args.num_rounds, self._server.round, disable) as bars:
                while self._server.round < args.num_rounds and not self._stopped:
                    self._round(bars)
                    bars.show(self.history.rounds, self.history.total_bytes)
            if args.load_best_model_at_end:
                self._take_best()
        except BaseException as error:
            error.add_note(self._how_to_go_on())
            raise
        finally:
            self._local.load(self._server.params)
            self._trackers.end()
            self._note()
        self._crew.on_main(self._ended)
        return self.history

    # One round.

    def _round(self, bars: Progress) -> None:
        opened = self._rounds.open(self._server, encode=self._backend.needs_payload)
        try:
            server, report = self._played(opened, bars)
            best = self._judged(report)
        except BaseException:
            self._backend.rollback(self._server.round)
            raise
        self._server = server
        self._note_report(report, best)
        due = self._due(self._args.save_every, server.round)
        if due or self._is_best_to_keep() or (self._stopped and self._args.save_every > 0):
            self._save()
        self._backend.end_round(opened, report, [*self._folder.saved, server.round])
        self._do(self._crew.on_main(lambda: self._tell(report)), report)

    def _judged(self, report: RoundReport) -> Best:
        """The best round with this one; the main process judges for all."""
        if self._best.metric is None:
            return self._best
        return self._crew.on_main(lambda: self._best.after(report))

    def _note_report(self, report: RoundReport, best: Best) -> None:
        """Take the present round's report; its former one goes if it was evaluated since."""
        before = self.history.rounds[: report.round - 1]
        self.history, self._best = History((*before, report)), best
        if best.is_final and not self._stopped:
            self._stopped = True
            logger.info(
                "stopping after round %d: %s was %.4g after round %d, and not better for %d "
                "evaluations", report.round, best.metric, best.value,
                best.round, best.waited,
            )  # fmt: skip

    def _do(self, asked: FederatedControl, report: RoundReport) -> None:
        """Do what callbacks asked; whoever stops has had a last round, evaluated and saved."""
        args, number = self._args, report.round
        stops = asked.should_stop and not self._stopped
        save = asked.should_save or (stops and args.save_every > 0)
        evaluated = bool(report.metrics) or self._due(args.eval_every, number)
        if not evaluated and (asked.should_evaluate or (stops and args.eval_every > 0)):
            again = self._evaluated(self._server, report)
            self._note_report(again, self._judged(again))
            told = self._crew.on_main(lambda: self._tell_evaluation(again))
            self._stopped |= told.should_stop
            save |= told.should_save or self._is_best_to_keep() or number in self._folder.saved
            save |= self._stopped and args.save_every > 0
        elif number in self._folder.saved:
            save = False
        self._stopped |= asked.should_stop
        if save:
            self._save()

    def _save(self) -> None:
        local, best = self._local.first_local, self._best.round
        checkpoint = Checkpoint(self._server, self.history, self.ledger, local)
        self._backend.commit()
        self._crew.on_main(lambda: self._folder.save(checkpoint, self.model, best))
        self._folder.note_saved(self._server.round, best)

    def _is_best_to_keep(self) -> bool:
        return self._args.load_best_model_at_end and self._best.round == self._server.round

    def _played(self, opened: OpenRound, bars: Progress) -> tuple[ServerState, RoundReport]:
        ended, report = play(
            opened, self._args, self._backend, self._rounds, self._local, self.ledger,
            lambda outcomes: bars.within(outcomes, opened.awaited),
        )  # fmt: skip
        self._local.load(ended.params)
        if self._due(self._args.eval_every, ended.round):
            report = self._evaluated(ended, report)
        return ended, report

    def _evaluated(self, server: ServerState, report: RoundReport) -> RoundReport:
        metrics = {} if self._evaluate is None else self._evaluate()
        of_clients = self._backend.evaluate(server)
        for name, values in of_clients.items():
            spread = over_clients(list(values.values()), higher_is_better(name))
            metrics |= {f"client_{name}_{which}": value for which, value in spread.items()}
        return dataclasses.replace(report, metrics=metrics, client_metrics=of_clients)

    def _start(self, resume: bool | str | os.PathLike[str] | None) -> None:
        """Go to where the run begins, with the clients and the counted bytes as they were then."""
        facts = {**self._facts, **self._backend.facts()}
        found = self._folder.begin(resume, facts, self._described(facts), self._crew)
        if found is None:
            self.history, self.ledger = History(), Ledger()
            params = {name: tensor.clone() for name, tensor in self._local.shared.items()}
            seed = self._crew.on_main(lambda: noise_seed(self._args))
            first = self._local.first_server()
            self._server = dataclasses.replace(first, params=params, noise_seed=seed)
        else:
            self.history, self.ledger = found.history, found.ledger
            self._server = placed_like(found.server, self._local.shared)
            self._local.begin_with(found.first_local)
        self._best = Best.before(self._args).after_all(self.history)
        self._local.load(self._server.params)
        self._backend.begin(self._server, self.history, self._folder.saved)
        self._crew.on_main(lambda: self._folder.describe(self._described(facts)))

    def _described(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        values = sum(t.numel() for t in self._local.shared.values())
        sizes = self._backend.num_examples
        return describe_run(self._args, self._strategy, sizes, values, facts, self.model)

    def _began(self) -> bool:
        self._trackers.begin()
        self._callbacks.begin()
        self._callbacks.tell("on_train_begin", self._server)
        return self._callbacks.control.should_stop

    def _tell(self, report: RoundReport) -> FederatedControl:
        if self._logger is not None:
            tell_round(self._logger, report, self._args.num_rounds)
        self._trackers.log(report)
        self._folder.write_history(self.history, self.ledger)
        if report.metrics:
            self._callbacks.tell("on_evaluate", self._server, report)
        self._callbacks.tell("on_round_end", self._server, report)
        return self._callbacks.asked()

    def _tell_evaluation(self, report: RoundReport) -> FederatedControl:
        self._trackers.log_metrics(report)
        self._callbacks.tell("on_evaluate", self._server, report)
        return self._callbacks.asked()

    def _note(self) -> None:
        """Write down what is known when a run ends, however it ends."""
        population = len(self._backend.names)
        facts = training_facts(
            self.history, self._args, self._strategy, population, self._server.round,
            self._facts.get("local_trainer"),
        )  # fmt: skip
        rounds = self.history.rounds[: self._server.round]
        evaluated = (report.metrics for report in reversed(rounds) if report.metrics)
        note_training(self.model, facts, next(evaluated, {}))
        if self._crew.is_main:
            self._folder.write_history(self.history, self.ledger, at_once=True)

    def _ended(self) -> None:
        self._callbacks.tell("on_train_end", self._server, self.history)

    def _take_best(self) -> None:
        """Go to the best of the rounds that have a checkpoint; all have since the run began so."""
        saved = self._folder.saved
        best = Best.before(self._args).after_all(r for r in self.history if r.round in saved)
        if best.round != self._best.round:
            logger.warning(
                "round %d was the best (%s %.4g), but has no checkpoint: loading round %d",
                self._best.round, best.metric, self._best.value,
                best.round or self._server.round,
            )  # fmt: skip
        if best.round not in (0, self._server.round):
            found: list[Checkpoint] = []
            self._crew.together(lambda: found.append(self._folder.load(best.round)))
            self._server = placed_like(found[0].server, self._local.shared)

    def _how_to_go_on(self) -> str:
        return (
            f"stopped after round {self._server.round} of {self._args.num_rounds}; "
            f"{self._folder.how_to_go_on()}"
        )

    def _due(self, every: int, round: int) -> bool:
        return every > 0 and (round % every == 0 or round == self._args.num_rounds)
