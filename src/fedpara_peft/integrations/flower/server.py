"""The run on the server: the trainer's round, with nodes in place of its loop over clients."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from flwr.app import RecordDict
from flwr.serverapp import Grid
from torch import nn

from ...comm.errors import PayloadError
from ...comm.ledger import Ledger
from ...comm.payload import Payload, PayloadSize
from ...comm.state import State
from ...federation.arguments import FederatedArguments
from ...federation.averaging import AveragingBias
from ...federation.batches import Collator
from ...federation.callbacks import FederatedCallback
from ...federation.channel import Channel, uplink_like
from ...federation.checkpoint import (
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
from ...federation.client import LocalTrainer, LossFunction
from ...federation.errors import ArgumentsError, ResumeError, RoundError
from ...federation.evaluation import Evaluator, Metrics
from ...federation.history import History
from ...federation.loss import default_loss
from ...federation.privacy import noise_seed
from ...federation.schedule import factor_blocks
from ...federation.server import OpenRound, RoundServer
from ...federation.state import ClientUpdate, Refused, RoundReport, ServerState
from ...federation.strategies import FedAvg, Strategy
from .exchange import Directory, Replies, exchange
from .messages import job_record, read_answer, refusal
from .node import Answer, Job

logger = logging.getLogger("flwr.fedpara")

_RUN_FILE = "flower-run.txt"


@dataclass(frozen=True)
class ServerSetup:
    """What a server brings along.

    Attributes:
        model_fn: makes the model; seed it, so that all nodes and the server make the same.
        args: the run's settings; ``output_dir`` gets checkpoints, history, ledger and model.
        num_clients: the population; every client is a node of its own.
        strategy: the federated optimizer; FedAvg by default.
        compute_loss: ``(model, batch) -> loss`` or ``(loss, logits)``.
        data_collator: makes a batch from rows.
        eval_data_fn: examples to evaluate the global model on.
        compute_metrics: from an ``EvalPrediction`` to named numbers.
        callbacks: called on the server.
        deadline_s: how long a round waits for answers, and its beginning for nodes.
        resume: continue from the newest checkpoint in ``output_dir``, if there is one.
    """

    model_fn: Callable[[], nn.Module]
    args: FederatedArguments
    num_clients: int
    strategy: Strategy | None = None
    compute_loss: LossFunction | None = None
    data_collator: Collator | None = None
    eval_data_fn: Callable[[], Any] | None = None
    compute_metrics: Metrics | None = None
    callbacks: Sequence[FederatedCallback] = ()
    deadline_s: float = 600.0
    resume: bool = True


class FederationServer:
    """Runs all rounds; see :class:`ServerSetup`.

    Attributes:
        history: reports of the rounds so far.
        ledger: their transfers.

    Raises:
        ArgumentsError: the arguments do not fit the clients or the model.
    """

    def __init__(self, setup: ServerSetup) -> None:
        if not setup.deadline_s > 0:
            raise ArgumentsError(f"deadline_s must be positive, got {setup.deadline_s}")
        if setup.num_clients < 1:
            raise ArgumentsError(f"num_clients must be at least 1, got {setup.num_clients}")
        self._setup = setup
        self._args = args = setup.args
        self._strategy = setup.strategy or FedAvg()
        accelerator = Accelerator(mixed_precision=args.mixed_precision)
        self._model = setup.model_fn().to(accelerator.device)
        loss, collator = setup.compute_loss or default_loss, setup.data_collator
        self._local = LocalTrainer(self._model, args, accelerator, self._strategy, loss, collator)
        self._evaluator = Evaluator(
            accelerator, args.eval_batch_size, loss, setup.compute_metrics, collator
        )
        self._eval_data = setup.eval_data_fn() if setup.eval_data_fn else None
        self._channel = Channel(args)
        self._products = factor_blocks(self._model) if args.factor_schedule == "one_block" else []
        self._run_name = ""
        self._saved: list[int] = []
        self.history = History()
        self.ledger = Ledger()

    def run(self, grid: Grid) -> History:
        """Run all rounds with the nodes of a grid.

        Raises:
            RoundError: too few updates of a round could be used.
            ResumeError: the checkpoint is of another run, or starting afresh would overwrite one.
        """
        setup, args = self._setup, self._args
        state = self._start()
        directory = Directory(grid, setup.num_clients, setup.deadline_s)
        rounds = self._round_server(state, self._introduced(directory))
        for callback in setup.callbacks:
            callback.on_train_begin(state)
        folder = Path(args.output_dir)
        try:
            while state.round < args.num_rounds:
                state, report = self._round(rounds, state, grid, directory)
                self.history = History((*self.history.rounds, report))
                self._after_round(state, report)
        finally:  # also of a run that must stop: the last good global model
            self._local.load(state.params)
            self.history.save(folder / "history.json")
            self.ledger.save(folder / "ledger.npy")
            write_model(self._model, folder / "model")
        for callback in setup.callbacks:
            callback.on_train_end(state, self.history)
        return self.history

    # One round.

    def _round(
        self, rounds: RoundServer, state: ServerState, grid: Grid, directory: Directory
    ) -> tuple[ServerState, RoundReport]:
        start, deadline_s = time.perf_counter(), self._setup.deadline_s
        opened = rounds.open(state, encode=True)
        clients = set(opened.reporting)
        if clients and not directory.wait_for(clients, deadline_s, all=False):
            logger.warning("round %d: no sampled client is connected", opened.number + 1)
        replies = exchange(grid, directory, self._jobs(opened), str(opened.number + 1), deadline_s)
        for client in replies.sent:
            self.ledger.record(opened.number + 1, client, "downlink", opened.size)
        bias = None
        if self._args.report_averaging_bias:
            bias = AveragingBias(self._model, self._local.shared, state.params)
        for client in opened.reporting:
            if client in replies.content:
                update = self._use(rounds, opened, client, replies.content[client])
                if update is not None and bias is not None:
                    bias.add(update.update, rounds.weight(update))
        for refused in replies.refused:
            rounds.refuse(opened, refused)
        next_state, mean = rounds.close(opened)
        report = rounds.report(
            opened,
            self.ledger,
            time.perf_counter() - start,
            dropped=self._silent(opened, replies),
            averaging_bias=None if bias is None else bias.result(mean.update),
        )
        return next_state, self._evaluated(next_state, report)

    def _jobs(self, opened: OpenRound) -> dict[int, RecordDict]:
        kept = used_last(self.history)
        payload = opened.payload.data if opened.payload else b""
        needed = (*self._saved, opened.number)
        return {
            client: job_record(
                Job(self._run_name, opened.number, kept.get(client, 0), needed, payload)
            )
            for client in opened.reporting
        }

    def _use(
        self, rounds: RoundServer, opened: OpenRound, client: int, content: RecordDict
    ) -> ClientUpdate | None:
        """Take in what a client sent, or refuse it by name."""
        try:
            answer = read_answer(content)
            if not answer.reason:
                size = _size(answer.payload)
                self.ledger.record(opened.number + 1, client, "uplink", size)
            update = rounds.checked(self._decoded(opened, client, answer))
        except PayloadError as error:
            rounds.refuse(opened, Refused(client, error.reason, f"client {client}: {error}"))
            return None
        rounds.take_in(opened, update)
        return update

    def _decoded(self, opened: OpenRound, client: int, answer: Answer) -> ClientUpdate:
        if answer.reason:
            raise PayloadError(refusal(answer.reason), f"its node says {answer.message!r:.500}")
        if answer.round != opened.number:
            raise PayloadError(
                "stale", f"it answers round {answer.round + 1}, this is {opened.number + 1}"
            )
        if answer.num_examples < 1 or not abs(answer.train_loss) < float("inf"):
            raise PayloadError(
                "malformed", f"{answer.num_examples} examples, training loss {answer.train_loss}"
            )
        main, extra = uplink_like(self._strategy, opened.part)
        main = {name: main[name] for name in self._local.shared if name in main}
        form = self._channel.format("uplink", main, extra)
        found: State = form.decode(answer.payload, opened.number) if form.schema else {}
        moved, beside = self._channel.parted(found, main, extra)
        return ClientUpdate(client, answer.num_examples, moved, answer.train_loss, beside)

    def _silent(self, opened: OpenRound, replies: Replies) -> list[int]:
        silent = [client for client in opened.reporting if client not in replies.content]
        if silent:
            logger.warning(
                "round %d goes on without clients %s (deadline %g s)",
                opened.number + 1, silent, self._setup.deadline_s,
            )  # fmt: skip
        return silent

    def _evaluated(self, state: ServerState, report: RoundReport) -> RoundReport:
        self._local.load(state.params)
        if self._eval_data is None or not self._due(self._args.eval_every, report.round):
            return report
        found = self._evaluator(self._model, self._eval_data)
        return dataclasses.replace(report, metrics={f"eval_{n}": v for n, v in found.items()})

    # Around the rounds.

    def _start(self) -> ServerState:
        """The state to begin from; history, ledger and the run's name as they were then."""
        folder = Path(self._args.output_dir)
        found = checkpoints(folder)
        if found and not self._setup.resume:
            raise ResumeError(
                f"{folder} holds {list(found.values())[-1].name} of an earlier run: continue it "
                "with resume=True, or take another output_dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        name_file = folder / _RUN_FILE
        if found and name_file.exists():
            number, path = list(found.items())[-1]
            checkpoint = load_checkpoint(path, self._settings())
            self.history, self.ledger = checkpoint.history, checkpoint.ledger
            self._run_name = name_file.read_text().strip()
            self._saved = list(found)
            logger.info("continuing after round %d from %s", number, path)
            state = placed_like(checkpoint.server, self._local.shared)
            self._local.load(state.params)
            return state
        if found:
            raise ResumeError(
                f"{folder} holds checkpoints, but no {_RUN_FILE}: they are of a run in one place; "
                "take another output_dir"
            )
        self.history, self.ledger, self._saved = History(), Ledger(), []
        self._run_name = secrets.token_hex(8)
        name_file.write_text(self._run_name + "\n")
        params = {name: tensor.clone() for name, tensor in self._local.shared.items()}
        seed = noise_seed(self._args)
        return ServerState(0, params, buffers=self._local.buffers, noise_seed=seed)

    def _introduced(self, directory: Directory) -> list[int]:
        """Examples of every client, as far as nodes have come."""
        everybody = set(range(self._setup.num_clients))
        logger.info("waiting for %d clients", len(everybody))
        if not directory.wait_for(everybody, self._setup.deadline_s, all=True):
            missing = sorted(everybody - directory.nodes.keys())
            if len(missing) == len(everybody) or self._args.client_sampling == "weighted":
                raise RoundError(
                    f"{len(missing)} of {len(everybody)} clients did not come within "
                    f"{self._setup.deadline_s:g} s, first {missing[:5]}: start their nodes, raise "
                    "deadline_s, or use client_sampling='uniform'"
                )
            logger.warning("starting without clients %s", missing)
        return [directory.num_examples.get(client, 1) for client in sorted(everybody)]

    def _round_server(self, state: ServerState, num_examples: list[int]) -> RoundServer:
        start = dataclasses.replace(state, params=self._local.shared)
        return RoundServer(
            self._args, self._strategy, self._channel, num_examples, start, self._products
        )

    def _after_round(self, state: ServerState, report: RoundReport) -> None:
        loss = "-" if report.train_loss is None else f"{report.train_loss:.4f}"
        shown = "".join(f", {name} {value:.4f}" for name, value in report.metrics.items())
        logger.info(
            "round %d of %d: %d of %d clients, train_loss %s%s, %.3f MB, %.1f s",
            report.round, self._args.num_rounds,
            len(report.cohort) - len(report.dropped) - len({c for c, _ in report.refused}),
            len(report.cohort), loss, shown,
            (report.uplink_bytes + report.downlink_bytes) / 1e6, report.seconds,
        )  # fmt: skip
        if self._due(self._args.save_every, report.round):
            self._checkpoint(state)
        for callback in self._setup.callbacks:
            callback.on_round_end(state, report)

    def _checkpoint(self, state: ServerState) -> None:
        folder = self._args.output_dir
        checkpoint = Checkpoint(state, self.history, self.ledger)

        def save_model(path: str) -> None:
            write_model(self._model, path)

        save_checkpoint(folder, checkpoint, self._settings(), save_model)
        self._saved.append(state.round)
        limit = self._args.save_total_limit or len(self._saved)
        needless, self._saved = self._saved[:-limit], self._saved[-limit:]
        for number in needless:
            remove_checkpoint(Path(folder) / f"checkpoint-{number}")

    def _settings(self) -> dict[str, Any]:
        everything = {**self._local.shared, **self._local.local}
        return run_settings(self._args, self._strategy, [self._setup.num_clients], everything)

    def _due(self, every: int, round: int) -> bool:
        return every > 0 and (round % every == 0 or round == self._args.num_rounds)


def used_last(history: History) -> dict[int, int]:
    """By client, the last round in which its update was used: the version of its state."""
    used: dict[int, int] = {}
    for report in history:
        # A client whose second answer was refused took part all the same.
        missing = {*report.dropped, *(c for c, r in report.refused if r not in _BESIDE)}
        used.update({c: report.round for c in report.cohort if c not in missing})
    return used


def _size(payload: bytes) -> PayloadSize:
    """Length by parts, also of bytes that are no payload."""
    header = min(Payload(payload).size.header_bytes, len(payload))
    return PayloadSize(header, len(payload) - header)


#: Refusals of what came beside an answer.
_BESIDE = ("duplicate",)
