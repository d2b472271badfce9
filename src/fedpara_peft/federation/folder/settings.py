"""The settings of a run, written down for whoever reads its folder later."""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ...tuner.summary import fedpara_summary
from ..arguments import FederatedArguments
from ..strategies import Strategy
from .history import write_whole

#: File that the trainer writes into ``output_dir``.
SETTINGS_NAME = "settings.json"
#: Arguments that change nothing of the result.
_BESIDE = (
    "report_to", "disable_tqdm", "overwrite_output_dir", "client_store", "save_every",
    "save_total_limit", "eval_batch_size",
)  # fmt: skip
_PACKAGES = ("fedpara-peft", "torch", "peft", "transformers", "accelerate")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            continue
    return found


def published(args: FederatedArguments) -> dict[str, Any]:
    """The arguments that others may read: who knows the noise's seed can take the noise away."""
    return {name: value for name, value in args.described().items() if name != "dp_noise_seed"}


def describe_run(
    args: FederatedArguments,
    strategy: Strategy,
    num_examples: Sequence[int],
    num_values: int,
    facts: Mapping[str, Any],
    model: nn.Module,
) -> dict[str, Any]:
    """What a run was asked to do, as JSON has it.

    Args:
        args: its arguments.
        strategy: its federated optimizer.
        num_examples: of every client.
        num_values: communicated values of the model.
        facts: what it was given, to compare with another run's.
        model: what it trains.
    """
    arguments = published(args)
    own = ", ".join(f"{name}={value!r}" for name, value in vars(strategy).items())
    del arguments["output_dir"]  # the folder may be moved, and its path is nobody's business
    return {
        "strategy": f"{type(strategy).__name__}({own})",
        "clients": len(num_examples),
        "examples": sum(num_examples),
        "communicated_values": num_values,
        "arguments": arguments,
        "identity": {name: facts[name] for name in ("model", "clients", "strategy")},
        "adapters": describe_model(model),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What of a model is factorized and how, for its reader: settings, sizes, weight by weight."""
    found: dict[str, Any] = {}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    found["model"] = type(inner).__name__
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        for name in ("parameterization", "base_weight", "gamma", "r", "alpha", "nonlinearity"):
            value = getattr(config, name, None)
            if value is not None and not (name == "r" and found.get("gamma") is not None):
                found[name] = value
    summary = fedpara_summary(model)
    found["trained_parameters"] = summary.parameters
    found["plain_model_parameters"] = summary.dense_parameters
    if summary.dense_parameters:
        found["share"] = f"{summary.parameters / summary.dense_parameters:.2%}"
    found["weights"] = [
        [r.name, r.kind, list(r.shape), r.r, r.parameters, r.dense_parameters, r.scope]
        for r in summary.rows
    ]
    return found


def same_result(described: Mapping[str, Any]) -> dict[str, Any]:
    """Of a description, what another run must have in common to have the same result."""
    arguments = described.get("arguments", {})
    shaping = {name: value for name, value in arguments.items() if name not in _BESIDE}
    return {**shaping, **described.get("identity", {})}


def save_settings(folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Write ``settings.json``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder) / SETTINGS_NAME, json.dumps(settings, indent=1) + "\n")
