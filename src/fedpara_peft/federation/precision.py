"""Mixed precision of one run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from .errors import ArgumentsError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """In which precision a model runs; Accelerate keeps one for the whole process.

    A second trainer of a process may want another than the first.

    Attributes:
        name: ``no``, ``bf16`` or ``fp16``.
        device_type: where the model is.
    """

    name: str
    device_type: str

    @classmethod
    def of(cls, wanted: str | None, accelerator: Accelerator) -> Precision:
        """The precision that is asked for, by default that of ``accelerate launch``.

        Raises:
            ArgumentsError: Accelerate was launched with one that trains in other ways.
        """
        name = str(accelerator.mixed_precision) if wanted is None else wanted
        if name != "no" and name not in _DTYPES:
            raise ArgumentsError(
                f"accelerate was launched with mixed_precision={name!r}: set "
                "mixed_precision='no', 'bf16' or 'fp16'"
            )
        return cls(name, accelerator.device.type)

    @property
    def is_full(self) -> bool:
        """Whether nothing is done in fewer bits."""
        return self.name == "no"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients would vanish without a factor on the loss."""
        return self.name == "fp16"

    def autocast(self) -> AbstractContextManager[object]:
        """Run a forward pass in it."""
        if self.is_full:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=_DTYPES[self.name])
