"""What callbacks ask of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FederatedControl:
    """What a callback asks of the run, as transformers' ``TrainerControl`` has it.

    Set it in a method that takes ``control``. It is done right after that round's
    ``on_round_end``, on all processes; what is asked in ``on_train_begin`` after the first round.

    Attributes:
        should_stop: make this the last round: it is evaluated and saved as the last one is.
        should_save: write a checkpoint of this round, whatever ``save_every`` says.
        should_evaluate: evaluate after this round, whatever ``eval_every`` says.
    """

    should_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
