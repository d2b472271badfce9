"""``fedpara merge``: the plain transformers model that an adapter makes of its base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..comm.state import load_local
from ..tuner.config import FedParaConfig
from ..tuner.scope import local_tensors
from .arguments import new_parser
from .errors import CommandError
from .hub import adapter_config, adapter_folder
from .models import base_of_adapter, keys_that_differ, plain_name, saved_shapes

_EXAMPLES = """\
examples:
  fedpara merge ./adapter --base ./my-model --output ./merged

  # pFedPara: one client's own model
  fedpara merge ./shared --local ./mine --base ./my-model --output ./merged-mine

The result needs neither this package nor PEFT. Of a model trained from scratch (base_weight
"replaced" or "seeded") only the base's configuration is read, not its weights.
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(commands, "merge", "write the merged, plain model", _EXAMPLES, run)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
    parser.add_argument("--base", required=True, metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write; new")
    parser.add_argument(
        "--local", metavar="FOLDER", help="a client's local half, as save_local wrote it"
    )


def run(args: argparse.Namespace) -> None:
    """Merge and save."""
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(f"{output} exists: give --output a new folder")
    folder = adapter_folder(args.adapter)
    config = adapter_config(folder)
    if not isinstance(config, FedParaConfig):
        raise CommandError(f"{args.adapter} is no FedPara adapter: merge it with PEFT itself")
    chosen = base_of_adapter(args.base, "--base", folder, config)
    saved = saved_shapes(folder)
    base, missing = (chosen.random(), None) if config.from_scratch else chosen.load()
    plain = set(base.state_dict())
    try:
        # Trainable, for only then does a model have a local half that can be loaded.
        model: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        lacking = keys_that_differ(model, saved)
        if lacking:
            raise CommandError(
                f"{args.adapter} does not fit {args.base} (not in both: {', '.join(lacking[:3])}): "
                "give --base the model it was trained on"
            )
    except RuntimeError as error:  # torch's, of shapes that differ
        raise CommandError(
            f"{args.adapter} does not fit {args.base} ({' '.join(str(error).split())[:200]}): "
            "give --base the model it was trained on"
        ) from None
    if args.local is not None:
        load_local(model, args.local)
    local = {plain_name(name) for name in local_tensors(model)} & plain
    # Of a module that stays with the client the adapter has what it was before training.
    held = {*map(plain_name, saved)} - local | (local if args.local is not None else set())
    _refuse_random((local if missing is None else missing) - held, local, args)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CommandError(f"{args.adapter} is not merged: {error}") from None
    merged.save_pretrained(output)
    print(
        f"{output}: {type(merged).__name__}, {sum(p.numel() for p in merged.parameters()):,} values"
    )
    if config.form.local_halves and args.local is None:
        print("this is the shared model; --local makes a client's own of it")


def _refuse_random(names: set[str], local: set[str], args: argparse.Namespace) -> None:
    """A model of which a part is drawn anew at every merge is not the one that was trained."""
    if not names:
        return
    listed = ", ".join(sorted(names)[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")
    remedy = (
        "give --local the client's half that has them"
        if names <= local
        else "give --base a folder that has them, or merge the very model that was trained, in "
        "Python, by merge_and_unload(); modules_to_save puts such modules into the adapter"
    )
    raise CommandError(
        f"the merged model would have random weights, for neither {args.base} nor {args.adapter} "
        f"has {listed}: {remedy}"
    )
