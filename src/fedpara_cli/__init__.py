"""The command ``fedpara``: answers what needs no torch at once, and hands the rest on.

A package of its own, for whatever lies in ``fedpara_peft`` first imports torch and PEFT, which
takes seconds. What the commands take is read from ``commands.json``, which
``python -m fedpara_cli.describe`` writes from their parsers.
"""

from .launch import build_parser, main

__all__ = ["build_parser", "main"]
