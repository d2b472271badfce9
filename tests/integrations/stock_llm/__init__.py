"""A Flower app that tunes a language model with PEFT, as apps of its kind are written."""
