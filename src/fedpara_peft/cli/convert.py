"""``fedpara convert``: the same adapter as LoRA, LoHa or FedPara, exactly."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from ..comm.state import load_local
from ..tuner.config import FedParaConfig
from ..tuner.convert import loha_to_fedpara, save_as_loha, save_as_lora
from .arguments import new_parser
from .errors import CommandError
from .hub import (
    adapter_config,
    adapter_folder,
    empty_model,
    give_memory_to_trained,
    load_model_config,
)

_EXAMPLES = """\
examples:
  fedpara convert --to lora ./adapter ./lora --base ./my-model
  fedpara convert --to loha ./adapter ./loha --base ./my-model
  fedpara convert --to fedpara ./loha ./adapter

  from \\ to   lora            loha        fedpara
  fedpara     needs --base    needs --base    -
  loha        needs --base        -       no base model

--base may be a config.json: kinds and shapes of layers are needed, weights are not. A FedPara
adapter of rank r becomes a LoRA of rank r². Adapters with base_weight="replaced" have no other
form: merge them.
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(
        commands, "convert", "convert between FedPara, LoRA and LoHa, exactly", _EXAMPLES, run
    )
    parser.add_argument("--to", required=True, choices=("lora", "loha", "fedpara"))
    parser.add_argument("source", metavar="IN", help="adapter folder or Hub id")
    parser.add_argument("target", metavar="OUT", help="where to write; new")
    parser.add_argument("--base", metavar="MODEL", help="folder, config.json or Hub id")
    parser.add_argument(
        "--local", metavar="FOLDER",
        help="pFedPara: the client's local half, which will be in OUT: keep that private",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Convert and say what came of it."""
    target = Path(args.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CommandError(f"{target} exists: give OUT a new folder")
    source = adapter_folder(args.source)
    config = adapter_config(source)
    if isinstance(config, FedParaConfig):
        written = _from_fedpara(source, config, args)
    elif config.peft_type == PeftType.LOHA:
        written = _from_loha(source, args)
    else:
        raise CommandError(
            f"{args.source} is a {config.peft_type.value}: only FedPara and LoHa adapters convert"
        )
    print(f"{target}: {written.peft_type.value} of rank {written.r}")


def _from_loha(source: Path, args: argparse.Namespace) -> Any:
    if args.to == "loha":
        raise CommandError(f"{args.source} is a LoHa already")
    if args.to == "fedpara":
        return loha_to_fedpara(source, args.target)
    with tempfile.TemporaryDirectory() as folder:
        return _from_fedpara(Path(folder), loha_to_fedpara(source, folder), args)


def _from_fedpara(source: Path, config: FedParaConfig, args: argparse.Namespace) -> Any:
    if args.to == "fedpara":
        raise CommandError(f"{args.source} is a FedPara adapter already")
    if config.from_scratch:
        raise CommandError(
            f"{args.source} has base_weight={config.base_weight!r}: there is no base weight that a "
            f"{args.to} could be added to; use fedpara merge"
        )
    if args.base is None:
        raise CommandError(
            "FedPara factors do not say which kind of layer they are on: name the base model with "
            "--base (its config.json is enough)"
        )
    model = _with_factors(source, config, args)
    if args.local is not None:
        load_local(model, args.local)
    convert = save_as_lora if args.to == "lora" else save_as_loha
    return convert(model, args.target)


def _with_factors(source: Path, config: FedParaConfig, args: argparse.Namespace) -> PeftModel:
    """The base model without weights, the adapter with its factors."""
    config.inference_mode = False  # what is trained is what the adapter's file holds
    model = get_peft_model(empty_model(load_model_config(args.base, "--base")), config)
    give_memory_to_trained(model)
    unfit = f"{args.source} does not fit {args.base}: give --base the model it was trained on"
    try:
        found = set_peft_model_state_dict(model, load_file(source / SAFETENSORS_WEIGHTS_NAME))
    except RuntimeError:  # torch's, of shapes that differ
        raise CommandError(unfit) from None
    lacking = any(p.isnan().any() for p in model.parameters() if p.requires_grad)
    if found.unexpected_keys or lacking:
        raise CommandError(unfit)
    return model
