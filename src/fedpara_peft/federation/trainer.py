"""``FederatedTrainer``: the round, written once."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..comm.errors import PayloadError
from ..comm.ledger import Ledger
from ..comm.state import State
from ..tuner.card import note_training
from ..tuner.layer import FedParaLayer
from .arguments import FederatedArguments
from .averaging import AveragingBias
from .batched import BatchedTrainer
from .batches import Collator
from .callbacks import FederatedCallback
from .channel import Channel
from .checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    placed_like,
    remove_checkpoint,
    remove_partial,
    run_settings,
    save_checkpoint,
    write_model,
)
from .client import LocalTrainer, LossFunction
from .errors import ArgumentsError, ResumeError
from .evaluation import Evaluator, Metrics, over_clients
from .exchange import everyones
from .facts import training_facts
from .history import History
from .loss import default_loss
from .metrics import higher_is_better
from .population import Population
from .privacy import noise_seed
from .sampling import share_out
from .schedule import factor_blocks
from .server import OpenRound, RoundServer
from .settings import describe_run, published, save_settings
from .state import ClientState, ClientUpdate, Outcome, Refused, RoundReport, ServerState
from .store import ClientStore, DiskStore, MemoryStore
from .strategies import FedAvg, Strategy

logger = logging.getLogger(__name__)


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
        data_collator: makes a batch from rows; see :func:`~.batches.batches` for the default.
        compute_loss: ``(model, batch) -> loss`` or ``(loss, logits)``; see
            :func:`~.loss.default_loss` for the default.
        compute_metrics: from an ``EvalPrediction`` to named numbers; see
            :func:`~.metrics.higher_is_better` for what the names tell.
        strategy: the federated optimizer; FedAvg by default.
        callbacks: see :class:`~.callbacks.FederatedCallback`; called on the main process.
        client_eval_dataset: one data set per client, in the same order or by the same names, to
            evaluate each client's own model on (the global model and its local tensors).

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
        strategy: Strategy | None = None,
        callbacks: Sequence[FederatedCallback] | None = None,
        client_eval_dataset: Sequence[Any] | Mapping[Any, Any] | None = None,
    ) -> None:
        self.accelerator = Accelerator(
            log_with=args.report_to,
            project_dir=args.output_dir,
            mixed_precision=args.mixed_precision,
        )
        self.model = model.to(self.accelerator.device)
        self.args = args
        self.population = Population(train_dataset, client_eval_dataset)
        self.eval_dataset = eval_dataset
        self.strategy = strategy or FedAvg()
        self.callbacks = list(callbacks or ())
        self.history = History()
        self.ledger = Ledger()
        loss = compute_loss or default_loss
        self._local = LocalTrainer(
            self.model, args, self.accelerator, self.strategy, loss, data_collator
        )
        self._batched = self._batched_engine(loss)
        self._evaluator = Evaluator(
            self.accelerator, args.eval_batch_size, loss, compute_metrics, data_collator
        )
        self._store = self._new_store()
        self._saved: list[int] = []
        self._channel = Channel(args)
        self._server = RoundServer(
            args,
            self.strategy,
            self._channel,
            self.population.num_examples,
            ServerState(0, self._local.shared, buffers=self._local.buffers),
            factor_blocks(model) if args.factor_schedule == "one_block" else [],
        )

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None) -> History:
        """Run all rounds; the model holds the global state afterwards.

        A resumed run ends in the same state, bit for bit, as one that was never interrupted.

        Args:
            resume_from_checkpoint: True continues from the newest checkpoint in ``output_dir``, or
                starts afresh where there is none and says so; a path continues from that one, and
                newer ones are removed.

        Returns:
            The history, also written to ``output_dir/history.json``; the settings are in
            ``settings.json`` beside it.

        Raises:
            RoundError: a client's training diverged; the model holds the last good global state.
            ResumeError: the checkpoint is of another run, or starting afresh would overwrite one.
        """
        self._init_trackers()
        server, reports = self._start(resume_from_checkpoint)
        if self._is_main:
            save_settings(self.args.output_dir, self._described())
        callbacks = self.callbacks if self._is_main else []
        for callback in callbacks:
            callback.on_train_begin(server)
        with tqdm(
            total=self.args.num_rounds,
            initial=server.round,
            desc="round",
            disable=self.args.disable_tqdm or not self._is_main,
        ) as bar:
            while server.round < self.args.num_rounds:
                try:
                    server, report = self._round(server)
                except BaseException:
                    self._take_back(server)
                    raise
                reports.append(report)
                self._after_round(server, reports)
                bar.set_postfix(_progress(reports), refresh=False)
                bar.update()
        self._local.load(server.params)
        self.history = history = History(tuple(reports))
        note_training(
            self.model, training_facts(history, self.args, self.strategy, len(self.population))
        )
        if self._is_main:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            history.save(Path(self.args.output_dir) / "history.json")
        for callback in callbacks:
            callback.on_train_end(server, history)
        self.accelerator.end_training()
        return history

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
        found = self._evaluator(self.model, dataset, shared=True)
        return {f"eval_{name}": value for name, value in found.items()}

    def client_model(self, client: Any) -> nn.Module:
        """A client's own model: a copy of the global model with the client's local tensors.

        Args:
            client: its name (a key of ``train_dataset``) or index.

        Returns:
            A copy; ``merge_and_unload()`` and ``save_local`` work on it as on any model.

        Raises:
            ClientDataError: there is no such client.
        """
        state = self._store.get(self.population.index(client))
        here = _everything(self._local)
        kept = {name: tensor.clone() for name, tensor in here.items()}
        shared = {name: kept[name] for name in self._local.shared}
        self._local.load(shared, state)
        personal = copy.deepcopy(self.model)
        for name, tensor in here.items():
            tensor.copy_(kept[name])
        for module in personal.modules():
            if state is not None and isinstance(module, FedParaLayer):
                for adapter in module.specs:
                    module.keep_local_half(adapter)
        return personal

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the model in place: an adapter folder, a transformers folder, or safetensors.

        Args:
            output_dir: where to; ``args.output_dir`` by default.
        """
        write_model(self.model, output_dir or self.args.output_dir)

    # One round.

    def _round(self, server: ServerState) -> tuple[ServerState, RoundReport]:
        start = time.perf_counter()
        opened = self._server.open(server)
        for client in opened.cohort:
            self.ledger.record(server.round + 1, client, "downlink", opened.size)
        bias = None
        if self.args.report_averaging_bias:
            bias = AveragingBias(self.model, self._local.shared, server.params)
        slowest = 0.0
        self._local.rest(opened.resting)
        for outcome in self._outcomes(opened):
            if outcome.size is not None:
                slowest = max(slowest, outcome.seconds)
                self.ledger.record(server.round + 1, outcome.client, "uplink", outcome.size)
            if outcome.refused is not None:
                self._server.refuse(opened, outcome.refused)
            elif outcome.update is not None:
                self._server.take_in(opened, outcome.update)
                if bias is not None:
                    bias.add(outcome.update.update, self._server.weight(outcome.update))
        self._local.rest(())
        server, mean = self._server.close(opened)
        measured = None if bias is None else bias.result(mean.update)
        seconds = time.perf_counter() - start
        report = self._server.report(
            opened, self.ledger, seconds, averaging_bias=measured, slowest_client_s=slowest
        )
        self._local.load(server.params)
        if self._due(self.args.eval_every, server.round):
            report = self._evaluated(server, report)
        return server, report

    def _outcomes(self, opened: OpenRound) -> Iterator[Outcome]:
        """Train the clients; how each fared, in client order, on every process."""
        clients = opened.reporting
        if self.accelerator.num_processes == 1:
            yield from self._turns(clients, opened)
            return
        owners = share_out(clients, self.population.num_examples, self.accelerator.num_processes)
        mine: dict[int, Outcome] = {}
        failure = None
        try:
            here = [c for c in clients if owners[c] == self.accelerator.process_index]
            mine = {outcome.client: outcome for outcome in self._turns(here, opened)}
        except Exception as error:
            failure = error
        for outcome in everyones(self.accelerator, mine, failure, owners):
            if outcome.keeps_state:
                self._store.note(outcome.client, opened.number + 1)
            yield outcome

    def _turns(self, clients: list[int], opened: OpenRound) -> Iterator[Outcome]:
        """Train clients in this process, side by side where that pays; in client order."""
        data: dict[int, Any] = {}
        stacked: dict[int, Any] = {}
        shares: dict[int, float] = {}
        if self._batched is not None and self._batched.wanted(len(clients)):
            data = {client: self.population.train[client] for client in clients}
            for group in self._batched.groups(data):
                of_group = [data[client] for client in group]
                states = [self._store.get(client) for client in group]
                start = time.perf_counter()
                ended = self._batched.train(
                    group, of_group, opened.number, opened.broadcast, states, opened.resting
                )
                share = (time.perf_counter() - start) / len(group)
                stacked.update(zip(group, ended, strict=True))
                shares.update(dict.fromkeys(group, share))
        for client in clients:
            if client in stacked:
                engine = functools.partial(self._local.end, *stacked.pop(client))
            else:
                own = data[client] if client in data else self.population.train[client]
                state = self._store.get(client)
                engine = functools.partial(
                    self._local.train,
                    client, own, opened.number, opened.broadcast, state, opened.resting,
                )  # fmt: skip
            yield self._send(client, engine, opened, shares.get(client, 0.0))

    def _send(
        self,
        client: int,
        engine: Callable[[], tuple[ClientUpdate, ClientState]],
        opened: OpenRound,
        seconds: float,
    ) -> Outcome:
        """Take what a client trained through the channel; ``seconds`` it has trained already."""
        number, size, start = opened.number, None, time.perf_counter()
        try:
            update, state = engine()
            seconds += time.perf_counter() - start
            size = self._channel.format("uplink", update.update, update.extra).size
            update, state, _ = self._channel.uplink(update, state, number)
            update = self._server.checked(update)
        except PayloadError as error:
            refused = Refused(client, error.reason, str(error))
            return Outcome(client, size, refused=refused, seconds=seconds)
        if state:
            self._store.put(client, number + 1, state)
        return Outcome(client, size, update, keeps_state=bool(state), seconds=seconds)

    def _evaluated(self, server: ServerState, report: RoundReport) -> RoundReport:
        metrics: dict[str, float] = {}
        every: dict[str, tuple[float, ...]] = {}
        if self.eval_dataset is not None:
            metrics |= self.evaluate()
        if self.population.eval is not None:
            every = self._evaluate_clients(server)
            for name, values in every.items():
                spread = over_clients(values, higher_is_better(name))
                metrics |= {f"client_{name}_{which}": value for which, value in spread.items()}
        return dataclasses.replace(report, metrics=metrics, client_metrics=every)

    def _evaluate_clients(self, server: ServerState) -> dict[str, tuple[float, ...]]:
        """Every client's own model on its own data."""
        assert self.population.eval is not None
        processes = self.accelerator.num_processes
        found = []
        for client in range(self.accelerator.process_index, len(self.population), processes):
            self._local.load(server.params, self._store.get(client))
            found.append((client, self._evaluator(self.model, self.population.eval[client])))
        self._local.load(server.params)
        everyones_metrics = sorted(gather_object(found), key=lambda pair: pair[0])
        names = everyones_metrics[0][1]
        return {name: tuple(values[name] for _, values in everyones_metrics) for name in names}

    # Around the rounds.

    def _start(
        self, resume: bool | str | os.PathLike[str] | None
    ) -> tuple[ServerState, list[RoundReport]]:
        """The state to begin from, with the store and the ledger as they were then."""
        args = self.args
        found = checkpoints(args.output_dir)
        if found and not resume:
            raise ResumeError(
                f"{args.output_dir} holds {list(found.values())[-1].name} of an earlier run: "
                "continue it with train(resume_from_checkpoint=True), or take another output_dir"
            )
        folder = _asked(resume, found)
        if folder is None:
            if resume:
                logger.warning("no checkpoint in %s yet: starting afresh", args.output_dir)
            server = ServerState(
                0,
                _clone(self._local.shared),
                buffers=self._local.buffers,
                noise_seed=gather_object([noise_seed(args)])[0],  # the first process's, for all
            )
            reports: list[RoundReport] = []
            self.ledger = Ledger()
        else:
            checkpoint = load_checkpoint(folder, self._settings())
            server = placed_like(checkpoint.server, self._local.shared)
            reports, self.ledger = list(checkpoint.history), checkpoint.ledger
        if self._is_main:
            remove_partial(args.output_dir)
            for number, path in found.items():
                if number > server.round:
                    logger.warning("removing %s, newer than what is resumed", path)
                    remove_checkpoint(path)
            stored = DiskStore(self._store_folder)
            stored.rollback(server.round) if folder else stored.clear()
        self.accelerator.wait_for_everyone()
        self._store = self._new_store()
        self._saved = [number for number in found if number <= server.round]
        return server, reports

    def _after_round(self, server: ServerState, reports: list[RoundReport]) -> None:
        report = reports[-1]
        values = {"train_loss": report.train_loss, **report.metrics}
        values.update(uplink_bytes=report.uplink_bytes, downlink_bytes=report.downlink_bytes)
        self.accelerator.log({n: v for n, v in values.items() if v is not None}, step=report.round)
        touched: Sequence[int] | None = report.cohort
        if self._due(self.args.save_every, report.round):
            self._checkpoint(Checkpoint(server, History(tuple(reports)), self.ledger))
            touched = None
        self._store.prune([*self._saved, server.round], touched, owner=self._is_main)
        for callback in self.callbacks if self._is_main else ():
            callback.on_round_end(server, report)

    def _checkpoint(self, checkpoint: Checkpoint) -> None:
        """Commit the clients' states, then the checkpoint that speaks of them."""
        self._store.commit()
        self.accelerator.wait_for_everyone()
        self._saved.append(checkpoint.server.round)
        limit = self.args.save_total_limit or len(self._saved)
        needless, self._saved = self._saved[:-limit], self._saved[-limit:]
        if self._is_main:
            save_checkpoint(self.args.output_dir, checkpoint, self._settings(), self.save_model)
            for number in needless:
                remove_checkpoint(Path(self.args.output_dir) / f"checkpoint-{number}")
        self.accelerator.wait_for_everyone()

    def _take_back(self, server: ServerState) -> None:
        """After a failure: the last good global model and clients, not half a round."""
        self._local.rest(())
        self._local.load(server.params)
        self._store.rollback(server.round, owner=self._is_main)

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the interrupted one."""
        clients = [len(self.population), sum(self.population.num_examples)]
        return run_settings(self.args, self.strategy, clients, _everything(self._local))

    def _batched_engine(self, loss: LossFunction) -> BatchedTrainer | None:
        if self.args.engine == "sequential":
            return None
        batched = BatchedTrainer(self._local, self.args, self.accelerator, loss)
        obstacle = batched.obstacle()
        if obstacle is not None and self.args.engine == "batched":
            raise ArgumentsError(
                f"engine='batched' is not possible: {obstacle}; use engine='sequential'"
            )
        return None if obstacle is not None else batched

    def _described(self) -> dict[str, Any]:
        """The settings for whoever reads the folder later."""
        values = sum(t.numel() for t in self._local.shared.values())
        return describe_run(self.args, self.strategy, self.population.num_examples, values)

    def _new_store(self) -> ClientStore:
        disk = DiskStore(self._store_folder)
        wanted = self.args.client_store
        if wanted == "memory" and self.accelerator.num_processes > 1:
            raise ArgumentsError(
                "client_store='memory' needs one process, because a client may train on any: use "
                "'disk' or 'auto'"
            )
        in_memory = wanted == "memory" or (wanted == "auto" and self.accelerator.num_processes == 1)
        return MemoryStore(disk) if in_memory else disk

    @property
    def _store_folder(self) -> Path:
        return Path(self.args.output_dir) / "clients"

    @property
    def _is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _due(self, every: int, round: int) -> bool:
        return every > 0 and (round % every == 0 or round == self.args.num_rounds)

    def _init_trackers(self) -> None:
        if self.args.report_to is not None:
            config = {
                name: value if isinstance(value, int | float | str | bool) else str(value)
                for name, value in published(self.args).items()
                if value is not None
            }
            self.accelerator.init_trackers("federated", config)


def _progress(reports: list[RoundReport]) -> dict[str, str]:
    loss = reports[-1].train_loss
    sent = sum(r.uplink_bytes + r.downlink_bytes for r in reports)
    shown = {"loss": "-" if loss is None else f"{loss:.3f}", "sent": f"{sent / 1e6:.2f} MB"}
    metrics = next((r.metrics for r in reversed(reports) if r.metrics), {})
    for name in ("eval_accuracy", "client_accuracy_mean"):
        if name in metrics:
            shown["accuracy"] = f"{metrics[name]:.1%}"
    return shown


def _asked(resume: bool | str | os.PathLike[str] | None, found: Mapping[int, Path]) -> Path | None:
    """The checkpoint to resume from, if any."""
    if not resume:
        return None
    if resume is True:
        return list(found.values())[-1] if found else None
    return Path(resume)


def _everything(local: LocalTrainer) -> State:
    return {**local.shared, **local.local}


def _clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}
