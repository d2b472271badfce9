"""The clients' optimizers: torch's own, or any that is made like them."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import FederatedArguments
from ..arguments.checks import as_options
from ..errors import ArgumentsError

logger = logging.getLogger(__name__)

#: An optimizer's class, or what makes one from groups of parameters.
OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
#: Optimizers of which every entry of a tensor goes its own way, so that clients can be stacked.
_ENTRYWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
#: What a gradient of ours never is, or a step of ours has not.
_UNFIT = ("Optimizer", "SparseAdam", "LBFGS")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MUON = getattr(torch.optim, "Muon", None)


def optimizers_by_name() -> dict[str, type[Optimizer]]:
    """The optimizers of torch by their names in lower case."""
    found = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and n not in _UNFIT}
    return {n.lower(): c for n, c in found.items() if issubclass(c, Optimizer)}


class Optimizers:
    """Makes a new optimizer for every client's turn.

    The learning rates come from the arguments alone, as options of the groups; so do momentum and
    weight decay of torch's classes. A factory chooses all its other options by itself.

    Args:
        args: the run's settings.
        given: a class, or what makes an optimizer from a list of groups, ``{"params": […], "lr":
            η}`` each; ``args.optim`` by default.
        parameters: all that trains, by name.
        factors: names of FedPara's factors among them, which may have a rate of their own.

    Attributes:
        name: the optimizer's, for messages.
        momentum: of SGD, and 0 of others.
        sums_gradients: whether its steps are a sum of the gradients with weights known beforehand:
            plain SGD's with one learning rate, with or without momentum.
        can_pause: whether a step that one client of a stack does not make can be undone: a state
            of zeros is as good as none.
        has_state: whether it remembers anything from step to step.

    Raises:
        ArgumentsError: there is no such optimizer, or it does not suit the arguments.
    """

    def __init__(
        self,
        args: FederatedArguments,
        given: OptimizerFactory | None,
        parameters: Mapping[str, Tensor],
        factors: Collection[str] = (),
    ) -> None:
        if given is not None and (args.optim != "sgd" or args.optim_args):
            raise ArgumentsError(
                f"give an optimizer to the trainer, or optim={args.optim!r} and optim_args to the "
                "arguments, not both"
            )
        self._args = args
        self._given = given
        self._factors = frozenset(factors) if args.factor_learning_rate is not None else frozenset()
        if args.factor_learning_rate is not None and not self._factors:
            raise ArgumentsError(
                "factor_learning_rate needs trainable FedPara adapters: the model has none"
            )
        if given is not None and not callable(given):
            raise ArgumentsError(
                f"optimizer is {given!r:.80}: give a class such as torch.optim.AdamW, or what "
                "makes an optimizer from groups of parameters"
            )
        self._options = dict(as_options("optim_args", args.optim_args) or {})
        made = _named(args.optim) if given is None else given
        self._class = made if inspect.isclass(made) else None
        self._make: OptimizerFactory = made
        self.name = getattr(made, "__name__", type(made).__name__)
        self._check_options()
        self._probe: list[Optimizer] = []
        self._probe = self.make(parameters, 0)
        self._check_probe(parameters)
        self._tell()
        for optimizer in self._probe:
            optimizer.state.clear()  # some reserve it when they are made
        groups = [group for optimizer in self._probe for group in optimizer.param_groups]
        kinds = {type(optimizer) for optimizer in self._probe}
        self.can_pause = kinds == {torch.optim.SGD} and not any(g["dampening"] for g in groups)
        plain = self.can_pause and not any(g["nesterov"] or g["maximize"] for g in groups)
        self.momentum = float(groups[0]["momentum"]) if plain else 0.0
        self.has_state = kinds != {torch.optim.SGD} or any(g["momentum"] for g in groups)
        self.sums_gradients = plain and all(
            (g["momentum"], g["lr"]) == (self.momentum, groups[0]["lr"]) for g in groups
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a factory's optimizer is like, by name; of another's the arguments tell all."""
        if self._given is None:
            return {}
        options = {n: _ADDRESS.sub("", repr(v)) for n, v in self._probe[0].defaults.items()}
        return {"optimizer": [type(self._probe[0]).__name__, dict(sorted(options.items()))]}

    def obstacle(self) -> str | None:
        """What keeps clients with this optimizer from being stacked; None if nothing does."""
        kinds = {type(optimizer) for optimizer in self._probe}
        if kinds <= set(_ENTRYWISE):
            return None
        names = ", ".join(kind.__name__ for kind in _ENTRYWISE)
        return f"{self.name} mixes a tensor's entries, or may: {names} do not"

    def make(self, parameters: Mapping[str, Tensor], round: int) -> list[Optimizer]:
        """A new optimizer, or one for matrices and one for the rest.

        Args:
            parameters: what trains; of a stack's clients every tensor is ``(clients, …)``.
            round: rounds completed, for the learning rates.
        """
        if self._class is not _MUON or _MUON is None:
            return [self._new(self._make, parameters, round, self._options)]
        matrices = {n: p for n, p in parameters.items() if p.ndim == 2}
        rest = {n: p for n, p in parameters.items() if n not in matrices}
        # Muon's steps then have the length of AdamW's, and one learning rate does for both.
        options = {"adjust_lr_fn": "match_rms_adamw", **self._options}
        made = [self._new(_MUON, matrices, round, options)] if matrices else []
        return made + ([self._new(torch.optim.AdamW, rest, round, {})] if rest else [])

    def _new(
        self, make: Any, parameters: Mapping[str, Tensor], round: int, options: Mapping[str, Any]
    ) -> Optimizer:
        parts = ([n for n in parameters if n not in self._factors], False), (
            [n for n in parameters if n in self._factors], True,
        )  # fmt: skip
        groups = [
            {
                "params": [parameters[n] for n in names],
                "lr": self._args.learning_rate_at(round, factors=factors),
            }
            for names, factors in parts
            if names
        ]
        if inspect.isclass(make):
            options = {**self._shared_options(make), **options}
        try:
            found = make(groups, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentsError(
                f"the optimizer {self.name} cannot be made: {error}; see optim_args and optimizer"
            ) from error
        if found in self._probe:
            raise ArgumentsError(
                "the optimizer's factory returned the same object twice: make a new one from the "
                "groups that it is given, for every client and round"
            )
        return found

    def _shared_options(self, kind: type) -> dict[str, float]:
        """The arguments that a class has as its options."""
        known = _options_of(kind)
        found = {"lr": self._args.learning_rate} if "lr" in known else {}
        if "weight_decay" in known:
            found["weight_decay"] = self._args.weight_decay
        if "momentum" in known and self._args.momentum:
            found["momentum"] = self._args.momentum
        return found

    def _check_options(self) -> None:
        args = self._args
        for name in ("momentum", "weight_decay"):
            if not getattr(args, name):
                continue
            if self._class is None:
                raise ArgumentsError(
                    f"{name}={getattr(args, name)}, and the optimizer is made by a factory: let "
                    "the factory set it"
                )
            if name not in _options_of(self._make):
                raise ArgumentsError(
                    f"{self.name} has no {name}, got {name}={getattr(args, name)}: leave it out, "
                    "or see optim_args for what it has"
                )

    def _check_probe(self, parameters: Mapping[str, Tensor]) -> None:
        for optimizer in self._probe:
            if not isinstance(optimizer, Optimizer):
                raise ArgumentsError(
                    f"the optimizer's factory returned a {type(optimizer).__name__}: return a "
                    "torch.optim.Optimizer"
                )
            closure = inspect.signature(type(optimizer).step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise ArgumentsError(
                    f"{self.name} evaluates the loss several times a step, which clients do not: "
                    "take an optimizer that steps by gradients alone"
                )
        groups = [group for optimizer in self._probe for group in optimizer.param_groups]
        held = [id(p) for group in groups for p in group["params"]]
        if sorted(held) != sorted(map(id, parameters.values())):
            raise ArgumentsError(
                f"{self.name} does not hold all that trains, once each: make it from all the "
                "groups that its factory is given"
            )
        asked = {self._args.learning_rate_at(0, factors=n in self._factors) for n in parameters}
        own = [] if self._class else [_rate_of_its_own(optimizer) for optimizer in self._probe]
        if {group.get("lr") for group in groups} != asked or any(
            rate not in (None, self._args.learning_rate) for rate in own
        ):
            raise ArgumentsError(
                f"the optimizer {self.name} has a learning rate of its own: give it as "
                "learning_rate, from which every round's rate follows, and leave the groups' as it "
                "is"
            )

    def _tell(self) -> None:
        default = type(self._args).learning_rate
        if self.name != "SGD" and self._args.learning_rate == default and self._class is not None:
            logger.warning(
                "learning_rate=%g is the default for SGD: %s usually takes a smaller one",
                default, self.name,
            )  # fmt: skip
        if self._class is _MUON and len(self._probe) > 1:
            rest = sum(len(group["params"]) for group in self._probe[1].param_groups)
            logger.warning("Muon is for matrices: AdamW trains the other %d tensors", rest)


@functools.cache
def _options_of(kind: Callable[..., Any]) -> frozenset[str]:
    """Names of what a class takes; looked up for every client's turn."""
    return frozenset(inspect.signature(kind).parameters)


def _named(name: str) -> type[Optimizer]:
    known = optimizers_by_name()
    found = known.get(name.lower().replace("_", "").replace("-", ""))
    if found is None:
        raise ArgumentsError(
            f"optim must be one of {', '.join(known)}, got {name!r}; for others give the trainer "
            "an optimizer"
        )
    return found


def _rate_of_its_own(optimizer: Optimizer) -> Any:
    """The learning rate that a factory names; the groups', which go before it, would hide it."""
    rate = optimizer.defaults.get("lr")
    usual = inspect.signature(type(optimizer)).parameters.get("lr")
    return None if usual is None or rate == usual.default else rate
