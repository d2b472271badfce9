"""A trainer of transformers (or like it) in place of a client's local steps."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from accelerate.state import PartialState
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import ExportableState

from ...arguments import FederatedArguments
from ...arguments.local import LocalArguments
from ...errors import ArgumentsError, ClientDataError
from ...random import reseed
from ...strategies import LocalSteps, Strategy, has_own_loss
from ..steps import Stepped, nothing_counts
from .counted import Counted
from .untouched import alone, as_it_was, collecting_its_own

#: What makes a client's trainer: see :class:`GivenTrainer`.
LocalTrainerFactory = Callable[..., Any]

#: Of the arguments of how a client trains, those that are not its trainer's business.
_STILL_OURS = {
    "local_modules", "label_column", "mixed_precision", "factor_schedule", "report_averaging_bias",
}  # fmt: skip
#: What is given to every client anew, and what must not be: it would go from client to client.
_GIVEN = {
    "model": "every client's trainer is given the model",
    "train_dataset": "it is the client's",
    "model_init": "the model is never rebuilt",
    "peft_config": "give FederatedTrainer the adapter's model",
    "optimizers": "they would remember the clients before; see optimizer_cls_and_kwargs",
}
#: Of the training arguments, those that change nothing of the result, or differ among processes.
_BESIDE = {"output_dir", "logging_dir", "run_name", "local_rank", "report_to", "disable_tqdm"}


class GivenTrainer:
    """Makes a trainer for every client's turn, lets it train, and takes back what it left behind.

    Args:
        given: a class of transformers' trainers, or a ``functools.partial`` of one, with at least
            its ``args``; the model, the client's data, a seed of the turn's own and a temporary
            ``output_dir`` are added. Or a function ``(model, dataset, client, round)`` that returns
            something with ``train()`` which trains this model: a ``Trainer``, or what returns a
            ``training_loss`` and a ``global_step``.
        model: the model, which it trains in place.
        args: the run's settings.
        strategy: the federated optimizer.

    Raises:
        ArgumentsError: it is neither, or arguments or strategy ask for what it would not do.
    """

    def __init__(
        self,
        given: LocalTrainerFactory,
        model: nn.Module,
        args: FederatedArguments,
        strategy: Strategy,
    ) -> None:
        self._model = model
        found: Any = given
        self._named: dict[str, Any] = {}
        if isinstance(given, functools.partial):
            found, self._named = given.func, dict(given.keywords)
        of_transformers = inspect.isclass(found) and issubclass(found, _trainers())
        self._kind: type[Any] | None = found if of_transformers else None
        self._given = given
        self.name = getattr(found, "__name__", type(found).__name__)
        if not callable(given):
            raise ArgumentsError(
                f"local_trainer is {given!r:.80}: give functools.partial(Trainer, args=…), or a "
                "function (model, dataset, client, round) that returns a trainer"
            )
        _check_run(args, strategy)
        if self._kind is not None:
            self._check_named(given)

    @property
    def facts(self) -> dict[str, Any]:
        """What it is like, by name, to compare a run with its checkpoint."""
        if self._kind is None:
            return {"local_trainer": self.name}
        args = self._named["args"].to_dict()
        shown = {n: _shown(v) for n, v in sorted(args.items()) if n not in _BESIDE}
        beside = {n: _shown(v) for n, v in sorted(self._named.items()) if n != "args"}
        return {"local_trainer": self.name, "local_trainer's": {"args": shown, **beside}}

    def train(
        self, dataset: Any, client: Any, round: int, seed: int, device: torch.device
    ) -> Stepped:
        """Let a client train, in the model as it is.

        Args:
            dataset: its data.
            client: its name.
            round: rounds completed.
            seed: of this turn.
            device: where the model is.

        Raises:
            ClientDataError: there was nothing to train on.
            ArgumentsError: the trainer trains another model, or does not say what became of it.
        """
        reseed(seed, device)
        with (
            as_it_was(self._model),
            alone(),
            collecting_its_own(),
            tempfile.TemporaryDirectory() as folder,
        ):
            trainer = self._made(dataset, client, round, seed, folder)
            if self._kind is None:
                reseed(seed, device)  # making a Trainer has seeded them with its args' seed
            with _counting(trainer) as counted:
                told = trainer.train()
            self._check_trained(trainer)
            rate = getattr(getattr(trainer, "args", None), "learning_rate", math.nan)
            if accelerator := getattr(trainer, "accelerator", None):
                accelerator.free_memory()  # which it would keep until the next garbage collection
        loss, count, terms = self._told(told) if counted is None else counted.result()
        if not count:
            raise ClientDataError(
                f"{self.name} made no step: the client has nothing to train on that fits its "
                "arguments (max_length, say); leave it out"
            )
        if terms == 0:
            raise nothing_counts()
        return Stepped(loss, LocalSteps(count, float(rate), None), False, {}, terms)

    def _made(self, dataset: Any, client: Any, round: int, seed: int, folder: str) -> Any:
        if self._kind is None:
            trainer = self._given(self._model, dataset, client, round)
            if not callable(getattr(trainer, "train", None)):
                raise ArgumentsError(
                    f"local_trainer returned a {type(trainer).__name__}: return what has a "
                    "train(), such as a transformers Trainer"
                )
            if isinstance(trainer, _trainers()):
                _check_args(trainer.args)
                trainer.args = _own(trainer.args, folder)
        else:
            named = {**self._named, "args": _own(self._named["args"], folder, seed)}
            if callbacks := named.get("callbacks"):
                # Those that remember something for checkpoints start anew; others may be watching.
                named["callbacks"] = [
                    copy.deepcopy(c) if isinstance(c, ExportableState) else c for c in callbacks
                ]
            trainer = self._kind(model=self._model, train_dataset=dataset, **named)
        if getattr(trainer, "model_init", None) is not None:
            raise ArgumentsError(f"local_trainer has a model_init, but {_GIVEN['model_init']}")
        self._check_trained(trainer)
        return trainer

    def _check_trained(self, trainer: Any) -> None:
        if getattr(trainer, "model", self._model) is not self._model:
            raise ArgumentsError(
                f"local_trainer trains a {type(trainer.model).__name__} of its own: let it train "
                "the model that it is given"
            )

    def _told(self, told: Any) -> tuple[float, int, float | None]:
        loss, count = (getattr(told, n, None) for n in ("training_loss", "global_step"))
        if loss is None or count is None:
            raise ArgumentsError(
                f"{self.name}'s train() returned a {type(told).__name__}: return the "
                "training_loss and the global_step, as transformers' TrainOutput"
            )
        return float(loss), int(count), None

    def _check_named(self, given: Any) -> None:
        if getattr(given, "args", ()):
            raise ArgumentsError("give local_trainer's arguments by their names: args=…")
        for name in self._named.keys() & _GIVEN.keys():
            raise ArgumentsError(f"local_trainer has {name}: {_GIVEN[name]}; leave it out")
        args = self._named.get("args")
        if not isinstance(args, TrainingArguments):
            raise ArgumentsError(
                f"local_trainer has args={args!r:.80}: give {self.name} its arguments, "
                f"functools.partial({self.name}, args=TrainingArguments(…))"
            )
        _check_args(args)


def given_trainer(
    given: LocalTrainerFactory | None,
    model: nn.Module,
    args: FederatedArguments,
    strategy: Strategy,
) -> GivenTrainer | None:
    """A :class:`GivenTrainer`; None where none was given."""
    return None if given is None else GivenTrainer(given, model, args, strategy)


def _trainers() -> tuple[type[Any], ...]:
    """Transformers' ``Trainer``, if anybody has imported it: with it come datasets and pandas."""
    module = sys.modules.get("transformers.trainer")
    return () if module is None else (module.Trainer,)


def _check_run(args: FederatedArguments, strategy: Strategy) -> None:
    """Refuse what a trainer of others would not do."""
    for entry in fields(LocalArguments):
        value = getattr(args, entry.name)
        if entry.name not in _STILL_OURS and value != entry.default:
            raise ArgumentsError(
                f"{entry.name}={value!r:.60} is for clients without a local_trainer, which trains "
                "by its own arguments: set it there"
            )
    if args.engine == "batched":
        raise ArgumentsError("engine='batched' cannot have a local_trainer: use 'sequential'")
    name = type(strategy).__name__
    if strategy.sums_gradients or type(strategy).correction is not Strategy.correction:
        raise ArgumentsError(
            f"{name} corrects every gradient of a client, which a local_trainer does not: use "
            "FedAvg or one that acts on the server (FedAvgM, FedAdam, …), or no local_trainer"
        )
    if has_own_loss(strategy):
        raise ArgumentsError(
            f"{name}.local_loss would not be what a local_trainer minimizes: give the trainer a "
            "compute_loss of its own, or leave local_trainer out"
        )


def _check_args(args: TrainingArguments) -> None:
    for name in ("push_to_hub", "deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise ArgumentsError(
                f"local_trainer has {name}={getattr(args, name)!r:.40}: a client trains in this "
                "process's model and sends its update alone; leave it out"
            )


def _own(args: TrainingArguments, folder: str, seed: int | None = None) -> TrainingArguments:
    """A copy of a trainer's arguments for one turn: trainers change them, too."""
    shared = {id(v): v for v in vars(args).values() if isinstance(v, PartialState)}
    found = copy.deepcopy(args, shared)
    found.output_dir = folder
    found._n_gpu = min(1, found.n_gpu)  # a client trains where the model is
    if seed is not None:
        found.seed = trainer_seed(seed, found.seed)
        if found.data_seed is not None:
            found.data_seed = trainer_seed(seed, found.data_seed)
    return found


def trainer_seed(seed: int, own: int) -> int:
    """A trainer's seed of one turn, 32 bits: from the turn's, and that of its arguments."""
    return (seed ^ own) & 0xFFFFFFFF


@contextmanager
def _counting(trainer: Any) -> Iterator[Counted | None]:
    """Count what a trainer of transformers does; of others, what they say must do."""
    if not isinstance(trainer, _trainers()):
        yield None
        return
    counted = Counted(trainer)
    try:
        yield counted
    finally:
        counted.end()


def _shown(value: Any) -> Any:
    """A value as JSON has it, without what differs from process to process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(n): _shown(v) for n, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(v) for v in value]
    own = getattr(value, "__qualname__", None)
    return own if own is not None else type(value).__name__
