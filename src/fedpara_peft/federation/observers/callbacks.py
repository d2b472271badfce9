"""Callbacks of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..folder.history import History
    from ..state import RoundReport, ServerState


class FederatedCallback:
    """Override what you need; all methods do nothing by default."""

    def on_train_begin(self, server: ServerState) -> None:
        """Before the first round."""

    def on_round_end(self, server: ServerState, report: RoundReport) -> None:
        """After each round, with the new global state."""

    def on_train_end(self, server: ServerState, history: History) -> None:
        """After the last round."""
