"""The model card's part on FedPara: what is in the adapter, how to load it, how it was trained.

A card belongs to whoever writes it. Only what stands between two markers is ours, and written anew
at every save; the rest of a card, its tags included, is kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftModel

from .config import FedParaConfig
from .layer import factorized_weights
from .model import FedParaModel
from .summary import Summary, fedpara_summary

_BEGIN = "<!-- fedpara: what follows is written anew at every save -->"
_END = "<!-- fedpara: end; text outside is kept -->"
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_TAG = "base_model:adapter:"
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
_EVALUATED_ON = "evaluation data of the federated run"
_BIBTEX = """\
@inproceedings{hyeonwoo2022fedpara,
  title     = {FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning},
  author    = {Hyeon-Woo, Nam and Ye-Bin, Moon and Oh, Tae-Hyun},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {https://arxiv.org/abs/2108.06098},
}
"""


def note_training(
    model: Any, facts: Mapping[str, str], metrics: Mapping[str, float] | None = None
) -> None:
    """Have the model's cards tell how it was trained; without FedPara there is nothing to do.

    Args:
        model: any module.
        facts: text by name, such as ``{"rounds": "100"}``.
        metrics: of the newest evaluation, for the card's ``model-index``.
    """
    if _is_ours(model):
        model.base_model.training_facts = dict(facts)
        model.base_model.training_metrics = dict(metrics or {})


def write_card(model: PeftModel, folder: str | os.PathLike[str], stock: Callable[[], None]) -> None:
    """Write or update the card of a model in a folder.

    Args:
        model: any PEFT model; without FedPara the stock card is written.
        folder: where its ``README.md`` is.
        stock: PEFT's own writing of a card there, which adds the library and its version.
    """
    if not _is_ours(model):
        stock()
        return
    path = Path(folder) / "README.md"
    before = ModelCard.load(path) if path.is_file() else None
    if before is None or _is_untouched_template(before):
        fresh = ModelCard("---\n{}\n---\n\n# FedPara adapter\n", ignore_metadata_errors=True)
        fresh.save(path)
    stock()
    card = ModelCard.load(path)
    trained_on = card.data.base_model
    card.data = _data(card.data, None if before is None else before.data)
    if card.data.license is None:
        card.data.license = _license_of(trained_on)
    _add_results(card.data, model)
    card.text = _with_section(card.text, _section(model, card.data))
    card.save(path)


def _is_ours(model: Any) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, FedParaModel)


def _is_untouched_template(card: ModelCard) -> bool:
    """Whether it is the Hub's template with nothing filled in, as ``push_to_hub`` makes it."""
    mark = "(description)"
    whole = ModelCard.from_template(ModelCardData(), model_description=mark).text
    head, _, tail = whole.partition(mark)
    text = card.text
    if not (text.startswith(head) and text.endswith(tail)):
        return False
    return "automatically generated" in text[len(head) : len(text) - len(tail)]


def _data(data: ModelCardData, before: ModelCardData | None) -> ModelCardData:
    """Metadata: the user's tags kept, a base model named only where others can find it."""
    kept = [] if before is None else before.tags or []
    tags = {tag for tag in (data.tags or []) if not tag.startswith(_TAG)} | {*kept, "fedpara"}
    if isinstance(data.base_model, str) and _is_hub_id(data.base_model):
        tags.add(_TAG + data.base_model)
    else:
        data.base_model = None if before is None else before.base_model
    data.tags = sorted(tags)
    return data


def _license_of(base_model: Any) -> str | None:
    """What the card of a base model in a local folder says; others are for the user to look up."""
    path = Path(base_model) / "README.md" if isinstance(base_model, str) else None
    if path is None or not path.is_file():
        return None
    found = ModelCard.load(path, ignore_metadata_errors=True).data.license
    return found if isinstance(found, str) else None


def _add_results(data: ModelCardData, model: PeftModel) -> None:
    """The newest evaluation as ``model-index``, beside results that a user has put there."""
    kept = [found for found in data.eval_results or [] if found.dataset_name != _EVALUATED_ON]
    task = _TASKS.get(_task_of(next(iter(model.peft_config.values()))), "other")
    ours = [
        EvalResult(
            task_type=task,
            dataset_type="unknown",
            dataset_name=_EVALUATED_ON,
            metric_type=name.removeprefix("eval_"),
            metric_value=float(f"{value:.4g}"),
        )
        for name, value in (model.base_model.training_metrics or {}).items()
        if math.isfinite(value)
    ]
    data.eval_results = [*kept, *ours] or None
    if data.eval_results and data.model_name is None:
        data.model_name = "FedPara adapter"


def _task_of(config: Any) -> str:
    return str(getattr(config.task_type, "value", config.task_type))


def _is_hub_id(name: str) -> bool:
    """A Hub id: not empty, nor a folder on the machine that trained."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _with_section(text: str, section: str) -> str:
    """The card's text with our section in its place: where it was, else after the first heading."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return f"{before}{section}{after}"
    marker = "### Framework versions"
    head, found, tail = text.partition(marker)
    return f"{head.rstrip()}\n\n{section}\n\n{found}{tail}".rstrip() + "\n"


def _section(model: PeftModel, data: ModelCardData) -> str:
    configs = {n: c for n, c in model.peft_config.items() if isinstance(c, FedParaConfig)}
    parts = [
        _BEGIN,
        "## FedPara",
        "An adapter for [PEFT](https://github.com/huggingface/peft) of low-rank Hadamard weights, "
        "W = (X₁Y₁ᵀ) ⊙ (X₂Y₂ᵀ) ([FedPara, ICLR 2022](https://arxiv.org/abs/2108.06098)).",
    ]
    for name, config in configs.items():
        parts += [f"### Adapter `{name}`"] if len(configs) > 1 else []
        parts += [_loading(name, config, data.base_model), _facts_table(model, name, config)]
        if config.form.local_halves or config.local_modules:
            parts.append(
                "The personal half of the clients is not in it; each client keeps its own."
            )
    if model.base_model.training_facts:
        parts += ["### Federated training", _table(model.base_model.training_facts)]
    parts += ["### Licence", _licence(data)]
    parts += ["### Cite", f"```bibtex\n{_BIBTEX}```"]
    return "\n\n".join([*parts, _END])


def _licence(data: ModelCardData) -> str:
    if data.license is not None:
        return f"`{data.license}`, for the adapter. The base model has its own."
    return (
        "None is named: put `license:` into this card's metadata. What is merged is under the base "
        "model's, too."
    )


def _loading(name: str, config: FedParaConfig, base_model: Any) -> str:
    auto = _AUTO_CLASSES.get(_task_of(config), "AutoModel")
    lines = ["import fedpara_peft  # first: PEFT knows the method only then"]
    lines.append("from peft import PeftModel")
    if isinstance(base_model, str):
        lines.append(f"from transformers import {auto}\n")
        lines.append(f'base = {auto}.from_pretrained("{base_model}")')
    elif config.from_scratch:
        lines.append(
            "\nbase = ...  # the plain model, with any weights: the adapter brings its own"
        )
    else:
        lines.append("\nbase = ...  # the plain model the adapter was trained on, with its weights")
    where = "" if name == "default" else f', subfolder="{name}"'
    lines.append(f'model = PeftModel.from_pretrained(base, "folder or Hub id of this"{where})')
    return "```\npip install fedpara-peft\n```\n\n```python\n" + "\n".join(lines) + "\n```"


def _facts_table(model: PeftModel, name: str, config: FedParaConfig) -> str:
    summary = fedpara_summary(model, name)
    ranks = sorted({row.r for row in summary.rows if row.r is not None})
    facts: dict[str, str] = {
        "parameterization": config.parameterization,
        "base weight": config.base_weight,
    }
    if config.gamma is not None:
        facts["γ"] = f"{config.gamma:g}"
    shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
    facts["r"] = shown
    facts["rank within reach / full rank"] = _reachable(summary)
    facts["factorized weights"] = str(sum(row.r is not None for row in summary.rows))
    facts.update(_sizes(model, name, summary))
    return _table(facts)


def _reachable(summary: Summary) -> str:
    """Of the weights, from the least share of their full rank to the greatest."""
    texts = {row.reachable for row in summary.rows if row.reachable is not None}
    ordered = sorted(texts, key=lambda text: (Fraction(text.partition(",")[0]), text))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _sizes(model: PeftModel, name: str, summary: Summary) -> dict[str, str]:
    """Values and bytes against the dense weights in the same places."""
    factors = (half.x for found in factorized_weights(model, name) for half in found.halves)
    first = next(factors, None)
    width = 4 if first is None else first.element_size()
    ours, dense = summary.parameters, summary.dense_parameters
    return {
        "values trained": f"{ours:,} ({ours / dense:.1%} of {dense:,} dense ones)",
        "bytes": f"{ours * width:,} (dense: {dense * width:,})",
    }


def _table(facts: Mapping[str, str]) -> str:
    cells = ((n, v.replace("|", r"\|")) for n, v in facts.items())
    return "\n".join(["| | |", "|---|---|", *(f"| {n} | {v} |" for n, v in cells)])
