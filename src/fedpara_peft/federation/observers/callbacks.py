"""Callbacks of a run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentsError
from .control import FederatedControl

if TYPE_CHECKING:
    from ..folder.history import History
    from ..state import RoundReport, ServerState


class FederatedCallback:
    """Override what you need; all methods do nothing by default.

    A method that has a parameter ``control`` is given the run's :class:`FederatedControl`; one
    without is called without.
    """

    def on_train_begin(self, server: ServerState, control: FederatedControl | None = None) -> None:
        """Before the first round."""

    def on_evaluate(
        self, server: ServerState, report: RoundReport, control: FederatedControl | None = None
    ) -> None:
        """After each evaluation, whose numbers are the report's ``metrics``."""

    def on_round_end(
        self, server: ServerState, report: RoundReport, control: FederatedControl | None = None
    ) -> None:
        """After each round, with the new global state."""

    def on_train_end(self, server: ServerState, history: History) -> None:
        """After the last round, with the state that is left in the model."""


#: What every method is given beside ``control``.
_GIVEN = {
    "on_train_begin": ("server",),
    "on_evaluate": ("server", "report"),
    "on_round_end": ("server", "report"),
    "on_train_end": ("server", "history"),
}


class Callbacks:
    """Calls them in order, each method with what it takes.

    Args:
        callbacks: the user's; the list is read anew at every call.

    Attributes:
        control: what they ask.

    Raises:
        ArgumentsError: a method cannot be called with what it would be given.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = callbacks
        self.control = FederatedControl()
        for callback in callbacks:
            for method in _GIVEN:
                _takes_control(callback, method)

    def begin(self) -> None:
        """A run begins: nothing is asked yet."""
        self.control = FederatedControl()

    def tell(self, method: str, *given: Any) -> None:
        """Call this method of all."""
        for callback in self._callbacks:
            more = {"control": self.control} if _takes_control(callback, method) else {}
            function = getattr(callback, method, None)
            if function is not None:  # an object with some of the methods will do
                function(*given, **more)

    def asked(self) -> FederatedControl:
        """What has been asked since the last time; to stop stays asked."""
        found = self.control
        self.control = FederatedControl(should_stop=found.should_stop)
        return found


def _takes_control(callback: Any, method: str) -> bool:
    """Whether a callback's method takes ``control``, by its signature."""
    function, given = getattr(callback, method, None), _GIVEN[method]
    if function is None:
        return False
    signature = inspect.signature(function)
    takes = any(
        p.name == "control" or p.kind is p.VAR_KEYWORD for p in signature.parameters.values()
    )
    try:
        signature.bind(*given, **({"control": None} if takes else {}))
    except TypeError as error:
        raise ArgumentsError(
            f"{type(callback).__name__}.{method}{signature} cannot be called ({error}): let it "
            f"take ({', '.join(given)}), and control=None if it asks for something"
        ) from None
    return takes
