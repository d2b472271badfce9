"""``fedpara convert``: an adapter in another layout, exactly or at a rank."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from ..comm.state import load_local
from ..tuner.config import FedParaConfig
from ..tuner.convert import Conversion, convert_adapter
from .arguments import new_parser
from .errors import CommandError
from .hub import adapter_config, adapter_source
from .models import base_of_adapter, give_memory_to_trained, names_and_shapes

_EXAMPLES = """\
examples:
  # a LoHa file, whoever wrote it, as a LoRA for web interfaces; the best one of rank 32
  fedpara convert style.safetensors style-lora.safetensors --to kohya --rank 32
  # the same for diffusers: underscored names need the model
  fedpara convert style.safetensors lora.safetensors --to lora --base ./model/unet --rank 32
  # adapters of this package and of PEFT
  fedpara convert ./adapter ./lora --to lora --base ./my-model
  fedpara convert ./loha ./adapter --to fedpara

  --to      writes                    OUT
  lora      LoRA, module paths        a folder for PEFT, or a .safetensors file for diffusers
  kohya     LoRA, underscored names   a .safetensors file
  loha      LoHa, module paths        a folder for PEFT, or a .safetensors file
  lycoris   LoHa, underscored names   a .safetensors file
  fedpara   FedPara                   a folder for PEFT

A LoHa of rank r is a LoRA of rank r^2. --base may be a config.json or the weights alone: names and
shapes of layers are needed. Adapters with base_weight="replaced" have no other form: merge them.
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(
        commands, "convert", "convert between FedPara, LoHa and LoRA, in any layout", _EXAMPLES, run
    )
    parser.add_argument("source", metavar="IN", help="adapter folder, .safetensors file or Hub id")
    parser.add_argument("target", metavar="OUT", help="where to write; new")
    parser.add_argument(
        "--to", required=True, choices=("lora", "loha", "fedpara", "kohya", "lycoris")
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, metavar="K", help="LoRA: the best one of this rank")
    size.add_argument(
        "--tolerance", type=float, metavar="E",
        help="LoRA: the least rank whose relative error is at most E",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="MODEL", help="folder, config.json, .safetensors file or Hub id"
    )
    parser.add_argument(
        "--component", metavar="PART", help="of a pipeline's file this part alone: unet, …"
    )
    parser.add_argument("--prefix", help="put before the names of modules in a file")
    parser.add_argument(
        "--keep-others", action="store_true",
        help="copy layers of other methods as they are, instead of refusing them",
    )  # fmt: skip
    parser.add_argument(
        "--local", metavar="FOLDER",
        help="pFedPara: the client's local half, which will be in OUT: keep that private",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Convert and say what came of it."""
    target = Path(args.target)
    if target.is_file() or (target.exists() and any(target.iterdir())):
        new = "file" if target.suffix == ".safetensors" else "folder"
        raise CommandError(f"{target} exists: give OUT a new {new}")
    source = adapter_source(args.source)
    config = adapter_config(source) if source.is_dir() else None
    if isinstance(config, FedParaConfig):
        done = _convert(_from_fedpara(source, config, args), None, args)
    elif config is None or config.peft_type == PeftType.LOHA:
        if args.to == "loha" and config is not None and target.suffix != ".safetensors":
            raise CommandError(f"{args.source} is a LoHa already")
        done = _convert(source, config, args)
    else:
        raise CommandError(
            f"{args.source} is a {config.peft_type.value}: only FedPara and LoHa adapters convert"
        )
    _say(done)


def _convert(source: nn.Module | Path, config: Any, args: argparse.Namespace) -> Conversion:
    base: nn.Module | Path | None = None
    if args.base is not None and not isinstance(source, nn.Module):
        base = names_and_shapes(args.base, "--base", source, config)
    return convert_adapter(
        source,
        args.target,
        args.to,
        rank=args.rank,
        tolerance=args.tolerance,
        base=base,
        component=args.component,
        prefix=args.prefix,
        others="keep" if args.keep_others else "refuse",
        progress=sys.stderr.isatty(),
    )


def _say(done: Conversion) -> None:
    method = {"kohya": "LORA", "lycoris": "LOHA"}.get(done.to, done.to.upper())
    print(
        f"{done.target}: {method} of rank {done.rank}, {len(done.layers)} layers of {done.source}"
    )
    if any(layer.error for layer in done.layers):
        width = max(len(layer.name) for layer in done.layers)
        print(f"\n{'layer'.ljust(width)}   rank  exact  relative error")
        for layer in done.layers:
            name = layer.name.ljust(width)
            print(f"{name}  {layer.rank:5}  {layer.exact_rank:5}  {layer.error:14.3g}")
        print(f"{'all'.ljust(width)}  {done.rank:5}         {done.error:14.3g}")
    for what, layers in (("copied as they are", done.passed_on), ("left out", done.left_out)):
        if layers:
            plural, more = "s" * (len(layers) > 1), ", …" * (len(layers) > 3)
            print(f"{what}: {len(layers)} layer{plural}, {', '.join(layers[:3])}{more}")


def _from_fedpara(source: Path, config: FedParaConfig, args: argparse.Namespace) -> PeftModel:
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
    return model


def _with_factors(source: Path, config: FedParaConfig, args: argparse.Namespace) -> PeftModel:
    """The base model without weights, the adapter with its factors."""
    base = base_of_adapter(args.base, "--base", source, config)
    config.inference_mode = False  # what is trained is what the adapter's file holds
    model = get_peft_model(base.empty(), config)
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
