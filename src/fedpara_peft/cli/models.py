"""Models of transformers: of which class an adapter's base is, with weights or without."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..maths.errors import FedParaError
from ..tuner._peft import WRAPPER_PREFIX
from ..tuner.config import FedParaConfig
from ..tuner.convert.layouts.stream import TensorFile
from ..tuner.layer import factorized_layers
from ..tuner.scope import local_tensors
from .errors import CommandError
from .hub import explained, first_line, load_model_config

#: What PEFT's task types stand for.
AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Base:
    """The model that a command works on.

    Attributes:
        model: folder, ``config.json`` or Hub id.
        option: the argument it was given as, for errors.
        config: its configuration, with the labels of its head.
        cls: its class; None for a bare model.
        num_labels: the labels, where they are not those of the configuration that was saved.
    """

    model: str
    option: str
    config: Any
    cls: type[PreTrainedModel] | None
    num_labels: int | None = None

    @classmethod
    def saved(cls, model: str, option: str) -> Base:
        """The model that was saved, as it was."""
        config = load_model_config(model, option)
        return cls(model, option, config, _saved_class(config))

    def of_task(self, task_type: str | None) -> Base | None:
        """The model of this configuration for a task of PEFT's; None if there is none."""
        auto = AUTO_CLASSES.get(task_type or "")
        if auto is None or type(self.config) not in auto._model_mapping:
            return None
        found = auto._model_mapping[type(self.config)]
        if isinstance(found, list | tuple):  # several: the one that was saved, or the first
            found = self.cls if self.cls in found else found[0]
        config, text = self.config, self.config.sub_configs.get("text_config")
        if text is not None and found.config_class is text:  # the language model of a larger one
            config = config.get_text_config()
        return Base(self.model, self.option, config, found)

    def with_labels(self, num_labels: int) -> Base:
        """The same with a head of so many labels."""
        config = copy.deepcopy(self.config)
        config.num_labels = num_labels
        return Base(self.model, self.option, config, self.cls, num_labels)

    def empty(self) -> nn.Module:
        """The model on the ``meta`` device: shapes, no weights."""
        with torch.device("meta"):
            return self.random()

    def random(self) -> nn.Module:
        """The model with fresh weights."""
        try:
            return self.cls(self.config) if self.cls else AutoModel.from_config(self.config)
        except Exception as error:  # whatever a model makes of sizes that it cannot have
            raise CommandError(
                f"{self.config.name_or_path or self.model}: transformers makes no model of this "
                f"configuration ({first_line(error)})"
            ) from None

    def load(self) -> tuple[nn.Module, set[str]]:
        """The model with its weights, and the names of those that its files do not hold.

        The latter are random, as a new head is, or of another shape in the files.
        """
        changes = {} if self.num_labels is None else {"num_labels": self.num_labels}
        cls: Any = self.cls or AutoModel
        try:
            with explained(self.model, self.option):
                model, info = cls.from_pretrained(
                    self.model, output_loading_info=True, ignore_mismatched_sizes=True, **changes
                )
        except CommandError:
            raise
        except Exception as error:  # damaged weights, or sizes that no model has
            raise CommandError(
                f"{self.model} cannot be loaded ({first_line(error)}): save or fetch it again"
            ) from None
        return model, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def base_of_adapter(model: str, option: str, folder: Path, config: Any) -> Base:
    """The model that an adapter was trained on, made of a base that may have had another head.

    It is the first that has the adapter's tensors, in their shapes: of the adapter's task, of the
    class that the adapter names, or as it was saved; with the labels that the adapter's own head
    has. Where none has them all, the one with most: what is then done with it says what is wrong.

    Args:
        model: folder, ``config.json``, or Hub id.
        option: the argument it was given as, for the error.
        folder: the adapter's.
        config: the adapter's configuration.
    """
    saved = Base.saved(model, option)
    shapes = saved_shapes(folder)
    named = _transformers_class((config.auto_mapping or {}).get("base_model_class"))
    candidates = [
        saved.of_task(getattr(config.task_type, "value", config.task_type)),
        Base(model, option, saved.config, named) if named else None,
        saved,
    ]
    found: list[tuple[int, Base]] = []
    for candidate in candidates:
        for base in _in_numbers_of_labels(candidate, config, shapes) if candidate else ():
            differing = _num_differing(base, config, shapes)
            if not differing:
                return base
            found.append((differing, base))
    return min(found, key=lambda one: one[0])[1]


def names_and_shapes(model: str, option: str, source: Path, config: Any) -> nn.Module | Path:
    """What names and shapes of a base model's modules are taken from.

    A transformers model is built without weights; of any other the headers of its weights are read.

    Args:
        model: folder, ``config.json``, ``.safetensors`` file, or Hub id.
        option: the argument it was given as, for the error.
        source: the adapter, a folder or a file.
        config: its configuration; a file has none.
    """
    path = Path(model)
    if path.suffix == ".safetensors" and path.is_file():
        return path
    if path.is_dir() and any(path.glob("*.safetensors")) and not _is_transformers(path):
        return path
    if config is None:
        return Base.saved(model, option).empty()
    return base_of_adapter(model, option, source, config).empty()


def _is_transformers(folder: Path) -> bool:
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _saved_class(config: Any) -> type[PreTrainedModel] | None:
    """The class that the configuration's weights were saved from; None if unknown."""
    return next(filter(None, map(_transformers_class, config.architectures or ())), None)


def _transformers_class(name: str | None) -> type[PreTrainedModel] | None:
    cls = getattr(transformers, name or "", None)
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def _in_numbers_of_labels(base: Base, config: Any, saved: Shapes) -> Iterator[Base]:
    """The model as configured, then with the labels that the shapes of the saved head tell.

    The head is what has another shape with another number of labels, whatever its name.
    """
    yield base
    labels = base.config.num_labels
    models = [_with_adapter(x, config) for x in (base, base.with_labels(labels + 1))]
    here, more = ({} if model is None else _shapes(model) for model in models)
    told = {
        labels + (size - one) / (two - one)
        for name in here.keys() & more.keys() & saved.keys()
        for one, two, size in zip(here[name], more[name], saved[name], strict=False)
        if one != two
    }
    yield from (base.with_labels(int(n)) for n in sorted(told - {labels}) if n >= 1 and n % 1 == 0)


def _num_differing(base: Base, config: Any, saved: Shapes) -> int:
    """How many tensors of an adapter's file do not fit; all, if the adapter has no place at all."""
    model = _with_adapter(base, config)
    if model is None:
        return len(saved) + 1
    shapes = _shapes(model)
    reshaped = sum(shapes[name] != saved[name] for name in shapes.keys() & saved.keys())
    return len(keys_that_differ(model, saved)) + reshaped


def _with_adapter(base: Base, config: Any) -> nn.Module | None:
    own = copy.deepcopy(config)  # PEFT fills it in
    if isinstance(own, FedParaConfig) and own.base_weight == "seeded":
        own.base_weight = "replaced"  # it saves the same tensors, and no bases are drawn
    try:
        return get_peft_model(base.empty(), own)
    except (FedParaError, ValueError, TypeError):  # said when the adapter is loaded into it
        return None


def _shapes(model: Any) -> Shapes:
    """Of what the file of the model's adapter holds."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def saved_shapes(folder: Path) -> Shapes:
    """Of the tensors in an adapter's file."""
    with TensorFile(folder / SAFETENSORS_WEIGHTS_NAME) as file:
        return {name: info.shape for name, info in file.tensors.items()}


def keys_that_differ(model: Any, saved: Collection[str]) -> list[str]:
    """Tensors that either the model's adapter or its file lacks.

    Args:
        model: with the adapter.
        saved: the file's names.
    """
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    local = {plain_name(name) for name in local_tensors(model)}
    lacking = {name for name in wanted - {*saved} if plain_name(name) not in local}
    # An embedding that was saved beside the factors is the base model's.
    return sorted({*lacking, *({*saved} - wanted - model.state_dict().keys())})


def plain_name(name: str) -> str:
    """What the plain model calls a tensor of a model with an adapter, or of an adapter's file."""
    name = name.removeprefix(WRAPPER_PREFIX).replace(".modules_to_save.default.", ".")
    return name.replace(".base_layer.", ".")


def give_memory_to_trained(model: nn.Module) -> None:
    """Replace what an adapter trains on the ``meta`` device by NaN in main memory.

    Local halves, which no adapter's file holds, become neutral.
    """
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta and p.requires_grad:
                setattr(module, name, nn.Parameter(torch.full_like(p, torch.nan, device="cpu")))
    for _, layer in factorized_layers(model):
        for adapter_name, spec in layer.specs.items():
            if spec.form.local_halves:
                layer.reset_local_half(adapter_name)
