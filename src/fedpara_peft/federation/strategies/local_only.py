"""Every client alone: the baseline without a federation."""

from __future__ import annotations

from typing import ClassVar

from .base import Strategy


class LocalOnly(Strategy):
    """Nothing travels; whatever is trainable stays with its client."""

    communicates: ClassVar[bool] = False
    ranks_may_differ: ClassVar[bool] = True
