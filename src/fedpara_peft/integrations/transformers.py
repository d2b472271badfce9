"""transformers' ``Trainer``: keep the local half with its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..comm.errors import StateError
from ..comm.state import load_local, save_local


class LocalStateCallback(TrainerCallback):
    """Save and resume what ``save_pretrained`` leaves out: pFedPara's W₂ and local modules.

    A checkpoint of the ``Trainer`` holds what is communicated. This callback puts the local half
    beside it, so that resuming is exact and ``load_best_model_at_end`` restores it. Do not push
    checkpoint folders that it wrote to.

    The ``Trainer`` restores one adapter of the best checkpoint, and only if it is called
    ``"default"``; this callback restores every adapter, by its name.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the local half into the checkpoint's folder."""
        if args.should_save:
            save_local(kwargs["model"], _folder(args, state.global_step))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read it when training resumes.

        Raises:
            StateError: ``output_dir`` holds no checkpoint of this step with a local half, or one
                that training does not resume from.
        """
        if state.global_step:
            folder, model = _folder(args, state.global_step), kwargs["model"]
            for name, file in _adapter_files(model, folder).items():
                now = get_peft_model_state_dict(
                    model, adapter_name=name, save_embedding_layers=False
                )
                saved = load_file(file)
                if any(not torch.equal(saved[key], now[key].cpu()) for key in saved.keys() & now):
                    raise StateError(
                        f"training does not resume from {folder}, whose local half would not go "
                        "with what was loaded: resume from a checkpoint in output_dir"
                    )
            load_local(model, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the best checkpoint's, and its adapters where the ``Trainer`` has not."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            folder, model = Path(state.best_model_checkpoint), kwargs["model"]
            for name, file in _adapter_files(model, folder).items():
                set_peft_model_state_dict(model, load_file(file), adapter_name=name)
            load_local(model, folder)


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


def _adapter_files(model: nn.Module, folder: Path) -> dict[str, Path]:
    """The adapters of a checkpoint by name, where PEFT puts them."""
    files = {}
    for name in getattr(model, "peft_config", {}):
        own = folder if name == "default" else folder / name
        if (own / SAFETENSORS_WEIGHTS_NAME).is_file():
            files[name] = own / SAFETENSORS_WEIGHTS_NAME
    return files
