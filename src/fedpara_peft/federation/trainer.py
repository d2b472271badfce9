"""``FederatedTrainer``: the round, written once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors.torch import save_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import EvalPrediction

from ..comm.ledger import Ledger
from ..comm.payload import Payload, decode, encode, schema_of
from ..comm.state import State, communicated_state, local_state
from ..tuner.scope import persistent_buffers
from .arguments import FederatedArguments
from .batches import Collator, batches
from .callbacks import FederatedCallback
from .client import LossFunction, difference, train_client
from .errors import ArgumentsError, ClientDataError
from .history import History
from .loss import batch_size, default_loss, labels_of_batch
from .sampling import sample_cohort
from .state import ClientUpdate, RoundReport, ServerState
from .strategies import FedAvg, Strategy

Metrics = Callable[[EvalPrediction], Mapping[str, float]]


class FederatedTrainer:
    """Train a model in a simulated federation.

    Whatever of the model is trainable is federated: a plain module, a transformers model, any PEFT
    adapter. What crosses the wire is encoded and decoded for real, so the bytes reported are bytes
    that a deployment would send.

    Args:
        model: the global model, trained in place.
        args: the run's settings.
        train_dataset: one data set per client, as a sequence or a mapping by client name.
        eval_dataset: examples to evaluate the global model on.
        data_collator: makes a batch from rows; see :func:`~.batches.batches` for the default.
        compute_loss: ``(model, batch) -> loss`` or ``(loss, logits)``; see
            :func:`~.loss.default_loss` for the default.
        compute_metrics: from an ``EvalPrediction`` to named numbers.
        strategy: the federated optimizer; FedAvg by default.
        callbacks: see :class:`~.callbacks.FederatedCallback`.

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
    ) -> None:
        self.accelerator = Accelerator(log_with=args.report_to, project_dir=args.output_dir)
        if self.accelerator.num_processes > 1:
            raise NotImplementedError(
                "several processes are not supported yet: start with --num_processes 1"
            )
        self.model = model.to(self.accelerator.device)
        self.args = args
        self.client_names, self.clients = _named_clients(train_dataset)
        self.eval_dataset = eval_dataset
        self.data_collator = data_collator
        self.compute_loss: LossFunction = compute_loss or default_loss
        self.compute_metrics = compute_metrics
        self.strategy = strategy or FedAvg()
        self.callbacks = list(callbacks or ())
        self.ledger = Ledger()
        self._cohort_size = args.cohort_size(len(self.clients))
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise ArgumentsError(
                "the model has no trainable parameters: load adapters with is_trainable=True"
            )
        self._optimizer = torch.optim.SGD(
            trainable,
            lr=args.learning_rate,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
        )
        if local_state(model):
            raise NotImplementedError(
                "the model has local tensors (pFedPara's W₂ or local_modules), which would have to "
                "be kept for every client: not supported by the trainer yet; train them with "
                "communicated_state(model) and local_state(model) in a loop of your own"
            )
        # Buffers of a frozen base (batch-norm statistics) start afresh for every client.
        state = communicated_state(model)
        self._resting = {k: v for k, v in _buffers(model).items() if k not in state}
        self._not_communicated = _clone(self._resting)

    def train(self) -> History:
        """Run all rounds; the model holds the global state afterwards.

        Returns:
            The history, also written to ``output_dir/history.json``.

        Raises:
            RoundError: a client's loss is not finite.
            PayloadError: a payload does not decode to what was agreed on.
        """
        args = self.args
        self.ledger = Ledger()
        self._init_trackers()
        # Views of the model's own tensors, looked up once: training changes them in place.
        self._live = communicated_state(self.model)
        server = ServerState(
            round=0,
            params=_clone(self._live),
            buffers=frozenset(_buffers(self.model)),
        )
        reports: list[RoundReport] = []
        for callback in self.callbacks:
            callback.on_train_begin(server)
        with tqdm(total=args.num_rounds, desc="round", disable=args.disable_tqdm) as bar:
            for _ in range(args.num_rounds):
                try:
                    server, report = self._round(server)
                except BaseException:
                    self._load_global(server.params)  # the last good model, not a client's
                    raise
                reports.append(report)
                self._after_round(server, report)
                bar.set_postfix(self._progress(reports), refresh=False)
                bar.update()
        history = History(tuple(reports))
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        history.save(Path(args.output_dir) / "history.json")
        for callback in self.callbacks:
            callback.on_train_end(server, history)
        self.accelerator.end_training()
        return history

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Evaluate the model in place.

        Args:
            dataset: examples; the trainer's ``eval_dataset`` by default.

        Returns:
            ``eval_loss`` and, where ``compute_metrics`` is given, its numbers as ``eval_<name>``.

        Raises:
            ArgumentsError: there is nothing to evaluate on, or metrics need outputs that
                ``compute_loss`` does not return.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None or not len(dataset):
            raise ArgumentsError("there are no examples to evaluate on: give eval_dataset")
        was_training = self.model.training
        self.model.eval()
        total, seen = 0.0, 0
        logits: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        with torch.no_grad():
            for batch in batches(dataset, self.args.eval_batch_size, self.data_collator):
                batch = send_to_device(batch, self.accelerator.device)
                with self.accelerator.autocast():
                    output = self.compute_loss(self.model, batch)
                loss, outputs = output if isinstance(output, tuple) else (output, None)
                total += float(loss) * batch_size(batch)
                seen += batch_size(batch)
                if self.compute_metrics is not None:
                    target = labels_of_batch(batch)
                    if outputs is None or target is None:
                        raise ArgumentsError(
                            "compute_metrics needs logits and labels: let compute_loss return "
                            "(loss, logits) and name the labels 'labels'"
                        )
                    logits.append(outputs.float().cpu().numpy())
                    labels.append(target.cpu().numpy())
        self.model.train(was_training)
        metrics = {"eval_loss": total / seen}
        if self.compute_metrics is not None:
            prediction = EvalPrediction(np.concatenate(logits), np.concatenate(labels))
            found = self.compute_metrics(prediction)
            metrics.update({f"eval_{name}": float(value) for name, value in found.items()})
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the model in place: an adapter folder, a transformers folder, or safetensors.

        Args:
            output_dir: where to; ``args.output_dir`` by default.
        """
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_pretrained = getattr(self.model, "save_pretrained", None)
        if callable(save_pretrained):
            save_pretrained(folder)
        else:
            save_model(self.model, str(folder / "model.safetensors"))

    # One round.

    def _round(self, server: ServerState) -> tuple[ServerState, RoundReport]:
        start = time.perf_counter()
        number = server.round
        cohort = sample_cohort(len(self.clients), self._cohort_size, self.args.seed, number)
        schema = schema_of(server.params)
        downlink = encode(server.params)
        broadcast = self._to_device(decode(downlink.data, schema))
        updates = []
        for client in cohort:
            self.ledger.record(number + 1, client, "downlink", downlink)
            uplink, loss = self._client_turn(client, number, broadcast)
            self.ledger.record(number + 1, client, "uplink", uplink)
            updates.append(
                ClientUpdate(client, len(self.clients[client]), decode(uplink.data, schema), loss)
            )
        server = self.strategy.server_step(server, mean_update(updates, server.params))
        self._load_global(server.params)
        report = RoundReport(
            round=server.round,
            cohort=tuple(cohort),
            train_loss=_mean_loss(updates),
            metrics={},
            uplink_bytes=self.ledger.total_bytes(server.round, "uplink"),
            downlink_bytes=self.ledger.total_bytes(server.round, "downlink"),
            header_bytes=self.ledger.header_bytes(server.round),
            seconds=time.perf_counter() - start,
        )
        if self._due(self.args.eval_every, server.round) and self.eval_dataset is not None:
            report = dataclasses.replace(report, metrics=self.evaluate())
        return server, report

    def _client_turn(self, client: int, number: int, broadcast: State) -> tuple[Payload, float]:
        """Train one client from the broadcast and encode its update."""
        self._load_global(broadcast)
        loss = train_client(
            self.model,
            self._optimizer,
            self.clients[client],
            args=self.args,
            accelerator=self.accelerator,
            compute_loss=self.compute_loss,
            collator=self.data_collator,
            strategy=self.strategy,
            broadcast=broadcast,
            round=number,
            client=client,
        )
        return encode(difference(self._live, broadcast)), loss

    def _load_global(self, params: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._live.items():
                tensor.copy_(params[name])
            for name, tensor in self._resting.items():
                tensor.copy_(self._not_communicated[name])

    # Around the rounds.

    def _after_round(self, server: ServerState, report: RoundReport) -> None:
        values = {"train_loss": report.train_loss, **report.metrics}
        values.update(uplink_bytes=report.uplink_bytes, downlink_bytes=report.downlink_bytes)
        self.accelerator.log(values, step=report.round)
        if self._due(self.args.save_every, report.round):
            self.save_model(str(Path(self.args.output_dir) / f"round-{report.round}"))
        for callback in self.callbacks:
            callback.on_round_end(server, report)

    def _due(self, every: int, round: int) -> bool:
        return every > 0 and (round % every == 0 or round == self.args.num_rounds)

    def _init_trackers(self) -> None:
        if self.args.report_to is not None:
            config = dataclasses.asdict(self.args)
            self.accelerator.init_trackers(
                "federated", {k: v for k, v in config.items() if v is not None}
            )

    def _progress(self, reports: list[RoundReport]) -> dict[str, str]:
        sent = sum(r.uplink_bytes + r.downlink_bytes for r in reports)
        shown = {"loss": f"{reports[-1].train_loss:.3f}", "sent": f"{sent / 1e6:.2f} MB"}
        metrics = next((r.metrics for r in reversed(reports) if r.metrics), {})
        if "eval_accuracy" in metrics:
            shown["accuracy"] = f"{metrics['eval_accuracy']:.1%}"
        return shown

    def _to_device(self, state: State) -> State:
        return {name: tensor.to(self.accelerator.device) for name, tensor in state.items()}


def mean_update(updates: Sequence[ClientUpdate], like: Mapping[str, Tensor]) -> State:
    """The cohort's mean update, weighted by example counts and summed in client order.

    The fixed order makes the result independent of who computed what. Integer tensors (counters of
    norm layers) are rounded.
    """
    ordered = sorted(updates, key=lambda u: u.client)
    total = sum(u.num_examples for u in ordered)
    mean = {}
    for name, reference in like.items():
        dtype = reference.dtype if reference.is_floating_point() else torch.float64
        accumulated = torch.zeros(reference.shape, dtype=dtype, device=reference.device)
        for update in ordered:
            part = update.update[name].to(device=reference.device, dtype=dtype)
            accumulated.add_(part, alpha=update.num_examples / total)
        if not reference.is_floating_point():
            accumulated = accumulated.round()
        mean[name] = accumulated.to(reference.dtype)
    return mean


def _mean_loss(updates: Sequence[ClientUpdate]) -> float:
    total = sum(u.num_examples for u in updates)
    return sum(u.train_loss * u.num_examples for u in updates) / total


def _named_clients(train_dataset: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(train_dataset, Mapping):
        names, clients = list(train_dataset), list(train_dataset.values())
    elif isinstance(train_dataset, Sequence):
        names, clients = list(range(len(train_dataset))), list(train_dataset)
    else:
        raise ClientDataError(
            f"train_dataset is a {type(train_dataset).__name__}: give a list or mapping with one "
            "data set per client, e.g. from partition(…)"
        )
    if not clients:
        raise ClientDataError("there are no clients: train_dataset is empty")
    empty = [name for name, data in zip(names, clients, strict=True) if not len(data)]
    if empty:
        raise ClientDataError(
            f"{len(empty)} clients have no data, first {empty[:3]}: leave them out, or use "
            "partition(…), which gives every client at least one example"
        )
    return names, clients


def _buffers(model: nn.Module) -> State:
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in persistent_buffers(model)}


def _clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}
