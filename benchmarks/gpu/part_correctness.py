"""Whether the GPU computes what it should: layers, checkpoints, and whole federations."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import os
import random
import sys
import tempfile
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from session import Measurement, Session, products_in
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedpara_peft import FedParaConfig

ROOT = Path(__file__).resolve().parents[2]

# The tests' own layers and federations; another package may be called `tests` where this runs.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(ROOT / "tests")]
from tests import layer_kinds  # noqa: E402
from tests.federation import runs  # noqa: E402

#: Sizes at which other kernels work than at the tests' own.
layer_kinds.KINDS |= {
    "linear, large": (lambda: nn.Linear(768, 1024), lambda: torch.randn(2, 100, 768)),
    "conv2d, large": (
        lambda: nn.Conv2d(64, 128, 3, padding=1),
        lambda: torch.randn(4, 64, 16, 16),
    ),
    "embedding, large": (
        lambda: nn.Embedding(5000, 512),
        lambda: torch.randint(0, 5000, (4, 64)),
    ),
    "lstm, large": (lambda: nn.LSTM(128, 256, 2), lambda: torch.randn(20, 8, 128)),
}
#: How a layer runs: its dtype, autocast's, and the largest relative error of outputs and gradients.
WAYS: dict[str, tuple[torch.dtype, torch.dtype | None, float]] = {
    "float32": (torch.float32, None, 1e-4),
    "tf32": (torch.float32, None, 1e-2),
    "bf16": (torch.bfloat16, None, 0.1),
    "bf16 autocast": (torch.float32, torch.bfloat16, 0.1),
    "fp16 autocast": (torch.float32, torch.float16, 3e-2),
}
#: In other precisions it is rounding that is looked at, not every form.
_FEW_FORMS = [("fedpara", None), ("pfedpara", "tanh"), ("lowrank", None)]
#: Runs of tests/federation/runs.py: strategy, parameterization, variant.
FEDERATIONS: list[tuple[str, str, str | None]] = [
    ("FedAvg", "fedpara", "codec"),
    ("FedAvg", "pfedpara", "batched"),
    ("FedAvg", "fedpara", "bf16"),
    ("FedAvg", "fedpara", "fp16"),
    ("Scaffold", "pfedpara", None),
    ("FedDyn", "fedpara", None),
    ("FedAdam", "lowrank", "keep"),
    ("FedProx", "fedpara", "noise"),
    ("FedAvgM", "fedpara", "one_block"),
    ("LocalOnly", "pfedpara", None),
    ("FedAvg", "pfedpara", "FedPer"),
    ("FedNova", "fedpara", None),
]
runs.VARIANTS |= {name: {"mixed_precision": name} for name in ("bf16", "fp16")}


def measure(session: Session, options: argparse.Namespace) -> None:
    """All checks; one that does not hold is a failure."""
    kinds = ["linear", "conv2d", "lstm"] if session.smoke else [*layer_kinds.KINDS]
    ways = [w for w in WAYS if session.device == "cuda" or w not in ("tf32", "fp16 autocast")]
    layers: dict[str, list[Measurement]] = {
        way: [
            ("layers", layer, {"kind": kind, "mode": mode, "way": way})
            for mode in layer_kinds.MODES
            for kind in kinds
        ]
        for way in ways
    }
    compiles: list[Measurement] = [
        ("compiled", compiled, {"kind": kind, "mode": mode, "path": path, "way": way})
        for kind in (["linear"] if session.smoke else ["linear", "conv2d", "embedding", "lstm"])
        for mode in (["frozen"] if session.smoke else layer_kinds.MODES)
        for path in (layer_kinds.PATHS if kind in ("linear", "conv2d") else ("auto",))
        for way in (["float32"] if session.smoke else ["float32", "bf16"])
    ]
    federations = FEDERATIONS[:2] if session.smoke else FEDERATIONS
    todo: list[Measurement] = [
        ("checkpoint", checkpoint, {}),
        *(("merge", merge, {"way": way}) for way in ("float32", "bf16")),
        ("generators", generators, {}),
        *layers.pop("float32"),
        *(
            ("federation", resume, {"strategy": s, "parameterization": p, "variant": v})
            for s, p, v in federations
        ),
        *(
            ("federation, other device", elsewhere, {"parameterization": p})
            for p in (["fedpara"] if session.smoke else ["dense", "fedpara", "pfedpara"])
        ),
        *compiles,
        *itertools.chain(*layers.values()),
    ]
    session.each(todo, collect=20)


def layer(session: Session, kind: str, mode: str, way: str) -> dict[str, Any]:
    """A layer in every form and on every path, beside the plain layer in float64 on the CPU."""
    dtype, autocast, bound = WAYS[way]
    forms = layer_kinds.FORMS if way == "float32" else _FEW_FORMS
    forms = forms[:2] if session.smoke else forms
    worst: dict[str, float] = {"output": 0.0, "gradient": 0.0}
    said = []
    for form, path in itertools.product(forms, layer_kinds.PATHS):
        if not layer_kinds.has_path(kind, form, path):
            continue
        r = 8 if "large" in kind else 2
        config = {"compute_path": path} if path != "auto" else {}
        host = layer_kinds.build(kind, mode, form, dtype, r=r, **config)
        if "large" in kind:  # weights no larger than a net's, else recurrent steps are chaotic
            _scale(host, 0.5)
        x = layer_kinds.inputs(kind, dtype)
        output, gradients = _run(host, x, session.device, way, autocast)
        exact, wanted = _exact(host, kind, x)
        errors = {"output": _apart(output, exact)} | {
            f"gradient of {name}": _apart(gradients[name], wanted[name]) for name in wanted
        }
        for what, error in errors.items():
            group = what.partition(" ")[0]
            worst[group] = max(worst[group], error)
            if not error <= bound:  # NaN is not, either
                said.append(f"{form[0]}, {form[1] or 'plain'}, {path}: {what} {error:.2g}")
    row = {"error": worst, "bound": bound}
    if said:
        raise WrongError(f"relative errors above {bound:g}: {'; '.join(said[:8])}")
    return row


class WrongError(AssertionError):
    """Something is not as it must be."""


def _run(
    host: nn.Module,
    x: Tensor,
    device: str,
    way: str,
    autocast: torch.dtype | None,
    copied: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A model's output on the device and its gradients, of the sum of squares."""
    model = copy.deepcopy(host) if copied else host
    model = model.to(device).train()  # cuDNN has no way back through its inference
    x = x.to(device)
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    with products_in(way):
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            out = model(x)
        out.float().square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if x.grad is not None:
        found["x"] = x.grad
    return out.detach(), found


def _exact(host: nn.Module, kind: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by the plain layer in float64; gradients of the factors and of x."""
    host.zero_grad()
    if x.is_floating_point():
        x = x.detach().double().requires_grad_()
    out = layer_kinds.twin(host, kind)(x)
    out.square().sum().backward()
    found = {
        n: p.grad for n, p in host.named_parameters() if p.grad is not None and "fedpara_" in n
    }
    if x.is_floating_point():
        found["x"] = x.grad
    return out.detach(), found


def _scale(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "fedpara_" in name:
                p.mul_(factor)


def compiled(session: Session, kind: str, mode: str, path: str, way: str) -> dict[str, Any]:
    """A compiled layer's output and gradients beside its own without compiling.

    What torch's tracing makes of it is checked, not what its code generator does.
    """
    torch.compiler.reset()
    dtype, _, bound = WAYS[way]
    host = layer_kinds.build(kind, mode, ("fedpara", None), dtype, compute_path=path)
    x = layer_kinds.inputs(kind, dtype)
    plain, wanted = _run(host, x, session.device, way, None)
    traced = copy.deepcopy(host)
    traced.compile(backend="aot_eager", fullgraph=kind != "lstm", dynamic=False)
    output, gradients = _run(traced, x, session.device, way, None, copied=False)
    errors = {"output": _apart(output, plain)} | {
        f"gradient of {name}": _apart(gradients[name], wanted[name]) for name in wanted
    }
    wrong = [f"{what} {error:.2g}" for what, error in errors.items() if not error <= bound]
    if wrong:
        raise WrongError(f"compiled: {'; '.join(wrong[:8])}")
    return {"error": {"output": max(errors.values())}, "bound": bound}


def _apart(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    size = float(exact.norm())
    return float((found - exact).norm()) / size if size else float(found.norm())


def _llama(session: Session, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(session.device, dtype).eval()
    return model, torch.randint(0, 256, (2, 16), device=session.device)


def checkpoint(session: Session) -> dict[str, Any]:
    """Adapt a Llama on the device, save it, load it there: the same bits come out."""
    base, ids = _llama(session, torch.float32)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, FedParaConfig(r=4, target_modules="all-linear"))
    _randomize(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wanted = model(ids).logits
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(plain, folder)
        devices = {p.device.type for p in loaded.parameters()}
        found = loaded(ids).logits
    if devices != {session.device}:
        raise WrongError(f"loaded onto {devices}, the model is on {session.device}")
    if not torch.equal(found, wanted):
        raise WrongError(f"a loaded adapter is {_apart(found, wanted):.2g} off")
    return {"error": {"output": 0.0}, "bound": 0.0}


def merge(session: Session, way: str) -> dict[str, Any]:
    """Merge twice: the same bits; and what comes out is what came before, up to rounding."""
    base, ids = _llama(session, WAYS[way][0])
    model = get_peft_model(base, FedParaConfig(r=4, target_modules="all-linear"))
    _randomize(model)
    with torch.no_grad(), products_in(way):
        before = model(ids).logits
        first, second = (copy.deepcopy(model).merge_and_unload() for _ in range(2))
        same = all(
            torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
        )
        error = _apart(first(ids).logits, before)
        model.merge_adapter()
        model.unmerge_adapter()
        back = _apart(model(ids).logits, before)
    bound = WAYS[way][2]
    if not same or not error <= bound or not back <= bound:
        raise WrongError(f"same bits: {same}; merged {error:.2g} off, unmerged {back:.2g}")
    return {"error": {"output": max(error, back)}, "bound": bound}


def _randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "fedpara_" in name:
                p.normal_(0, 0.1)


def resume(
    session: Session, strategy: str, parameterization: str, variant: str | None
) -> dict[str, Any]:
    """Five rounds at once, and in two goes with a checkpoint between: the same bits."""
    if variant == "noise" and find_spec("dp_accounting") is None:
        return {"skipped": "dp-accounting is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        once, twice = f"{folder}/once", f"{folder}/twice"
        with contextlib.redirect_stdout(io.StringIO()):
            runs.run(once, strategy, parameterization, 5, variant)
            runs.run(twice, strategy, parameterization, 3, variant)
            runs.run(twice, strategy, parameterization, 5, variant)
        wanted, found = (load_file(f"{f}/final.safetensors") for f in (once, twice))
    _require_finite(wanted)
    other = [n for n in wanted if not torch.equal(wanted[n], found[n])]
    if other or wanted.keys() != found.keys():
        raise WrongError(f"{len(other)} tensors differ after resuming, such as {other[:3]}")
    return {"tensors": len(wanted)}


def elsewhere(session: Session, parameterization: str) -> dict[str, Any]:
    """Three rounds without randomness on the device and on the CPU, by both engines."""
    found = {}
    for device, engine in ((session.device, "batched"), (session.device, "sequential"),
                           ("cpu", "sequential")):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, _on(device), products_in("float32"):
            runs.VARIANTS["batched"] = {"engine": engine}
            with contextlib.redirect_stdout(io.StringIO()):
                runs.run(folder, "FedAvg", parameterization, 3, "batched")
            found[device, engine] = load_file(f"{folder}/final.safetensors")
    runs.VARIANTS["batched"] = {"engine": "batched"}
    exact = found.pop(("cpu", "sequential"))
    _require_finite(exact)
    worst = max(_apart(state[n], exact[n]) for state in found.values() for n in exact)
    bound = 2e-4  # twelve steps and three means in float32
    if not worst <= bound:
        raise WrongError(f"engines or devices are {worst:.2g} apart")
    return {"error": {"output": worst}, "bound": bound}


def generators(session: Session) -> dict[str, Any]:
    """A run leaves the global generators as they were, the device's too."""

    def state() -> list[Any]:
        on_device = torch.cuda.get_rng_state() if session.device == "cuda" else torch.empty(0)
        return [torch.get_rng_state(), on_device, random.getstate(), np.random.get_state()[1]]

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        seen: list[list[Any]] = []
        for rounds in (0, 2):  # what making the model draws is the same; training draws nothing
            torch.manual_seed(3)
            random.seed(3)
            np.random.seed(3)
            runs.run(f"{folder}/{rounds}", "FedAvg", "fedpara", rounds, None)
            seen.append(state())
    same = [bool(np.array_equal(np.asarray(a, object), np.asarray(b, object)))
            if isinstance(a, tuple) else bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
            for a, b in zip(*seen, strict=True)]  # fmt: skip
    if not all(same):
        raise WrongError(f"generators put back (CPU, device, Python, NumPy): {same}")
    return {"same": same}


def _require_finite(state: dict[str, Tensor]) -> None:
    bad = [n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise WrongError(f"not finite: {bad[:3]}")


@contextlib.contextmanager
def _on(device: str) -> Iterator[None]:
    """Let Accelerate choose anew, and this device."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "true" if device == "cpu" else "false"
    _choose_anew()
    try:
        yield
    finally:
        os.environ["ACCELERATE_USE_CPU"] = before or "false"
        _choose_anew()


def _choose_anew() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
