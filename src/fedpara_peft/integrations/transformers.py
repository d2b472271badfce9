"""transformers' ``Trainer``: keep the local half with its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..comm.state import load_local, save_local


class LocalStateCallback(TrainerCallback):
    """Save and resume what ``save_pretrained`` leaves out: pFedPara's W₂ and local modules.

    A checkpoint of the ``Trainer`` holds what is communicated. This callback puts the local half
    beside it, so that resuming is exact and ``load_best_model_at_end`` restores it. Do not push
    checkpoint folders that it wrote to.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the local half into the checkpoint's folder."""
        save_local(kwargs["model"], _folder(args, state.global_step))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read it when training resumes."""
        if state.global_step:
            load_local(kwargs["model"], _folder(args, state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the best checkpoint's."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_local(kwargs["model"], state.best_model_checkpoint)


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"
