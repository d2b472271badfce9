"""Loss and predictions of a batch, for plain torch modules and transformers models."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function

from ..errors import ArgumentsError, ClientDataError
from .labels import label_name

#: Labels that do not count, in torch and transformers.
IGNORED = -100

#: transformers' losses that are means over the labels that count …
_OF_LABELS = {
    "ForMaskedLM", "ForTokenClassification", "ForSemanticSegmentation", "ForSequenceClassification",
    "ForImageClassification", "ForVideoClassification", "ForAudioClassification",
}  # fmt: skip
#: … and those where labels are the next tokens; None: it takes ForCausalLM's.
_OF_NEXT_TOKENS = {"ForCausalLM", "ForConditionalGeneration", None}


class Loss(NamedTuple):
    """What a loss function found in a batch.

    Attributes:
        mean: the mean loss, a scalar.
        outputs: the model's logits, for metrics; None: there are none.
        terms: of how many terms it is the mean (rows, or tokens that count); None: of rows. Means
            over several batches weigh them by it.
    """

    mean: Tensor
    outputs: Any = None
    terms: Tensor | float | None = None


LossFunction = Callable[[nn.Module, Any], Any]


def read_loss(found: Any, of: str = "compute_loss", clients: int | None = None) -> Loss:
    """What a loss function returned: a loss, ``(loss, outputs)`` or ``(loss, outputs, terms)``.

    Args:
        found: what it returned.
        of: the function, for the error.
        clients: of how many clients side by side it is, a number each; None: it is one number.

    Raises:
        ArgumentsError: it is something else, or the loss is not one number.
    """
    shape = () if clients is None else (clients,)
    if type(found) is Loss and isinstance(found.mean, Tensor) and found.mean.shape == shape:
        return found
    if isinstance(found, Mapping) and "loss" in found:  # a transformers output
        found = (found["loss"], found.get("logits"))
    parts = (found,) if isinstance(found, Tensor) else found
    if not isinstance(parts, tuple | list) or not 1 <= len(parts) <= 3:
        raise ArgumentsError(
            f"{of} returned a {type(found).__name__}: return the mean loss, (loss, logits) "
            "or (loss, logits, number of terms)"
        )
    loss = Loss(*parts)
    if not isinstance(loss.mean, Tensor) or loss.mean.numel() != (clients or 1):
        got = tuple(loss.mean.shape) if isinstance(loss.mean, Tensor) else type(loss.mean)
        raise ArgumentsError(f"{of} returned a loss of {got}: return a mean, one number")
    return loss if loss.mean.shape == shape else loss._replace(mean=loss.mean.reshape(shape))


@dataclass(frozen=True)
class DefaultLoss:
    """The loss where the user gives none.

    A mapping goes to the model by keyword and the loss is taken from its output (a transformers
    model's; also that of any model whose output has one). Where the output has none, it is the
    cross-entropy with the labels, as of a pair ``(inputs, labels)``: class indices, of any integer
    dtype, one for each row (N,), (N, 1), or for each of its positions (N, …), with logits
    (N, C, …) or (N, …, C); labels of -100 do not count.

    Attributes:
        label_column: where a mapping has its labels; None: see :func:`~.labels.label_name`.
    """

    label_column: str | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Loss:
        """The mean loss, the logits and the number of labels that count.

        Raises:
            ClientDataError: the batch has no labels this could use.
        """
        if isinstance(batch, Mapping):
            return self._of_mapping(model, batch)
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return classification_loss(model(batch[0]), batch[1])
        many = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ClientDataError(
            f"a batch is a {type(batch).__name__}{many}: give a mapping or a pair (inputs, "
            "labels), or compute_loss(model, batch)"
        )

    def _of_mapping(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        of_transformers = hasattr(getattr(model, "config", None), "model_type")
        if of_transformers and self.label_column is None and "labels" in batch:
            name: str | None = "labels"
        else:
            name = label_name(batch, self.label_column)
        if of_transformers:
            named = dict(batch)
            if name is not None:
                named["labels"] = named.pop(name)
            output = model(**named)
        else:
            named = self._inputs(model, batch, name)
            alone = len(named) == 1 and name not in named
            output = model(*named.values()) if alone else model(**named)
        loss = _entry(output, "loss")
        if loss is not None:
            logits = _entry(output, "logits")
            return Loss(loss, logits, terms_of(model, named, logits) if of_transformers else None)
        if name is None:
            raise ClientDataError(
                f"a batch has no labels ({sorted(batch)}): name the column 'labels', set "
                "label_column, or give compute_loss(model, batch)"
            )
        return classification_loss(output, batch[name])

    def _inputs(
        self, model: nn.Module, batch: Mapping[str, Any], name: str | None
    ) -> dict[str, Any]:
        """What of a batch goes to a plain model: all but the labels, unless it asks for them."""
        taken = _taken(model)
        asked = taken is not None and name in taken
        inputs = {k: v for k, v in batch.items() if k != name or asked}
        extra = [k for k in sorted(inputs) if taken is not None and k not in taken]
        if extra and len(inputs) > 1:
            raise ClientDataError(
                f"a batch has the columns {sorted(batch)} and the model takes "
                f"{sorted(taken or ())}: leave {extra} out, set label_column if they are labels, "
                "or give compute_loss(model, batch)"
            )
        return inputs


def classification_loss(output: Any, labels: Any) -> Loss:
    """Cross-entropy with class indices; see :class:`DefaultLoss` for the shapes.

    Raises:
        ClientDataError: the labels are no class indices that fit the logits.
    """
    logits = output if isinstance(output, Tensor) else _entry(output, "logits")
    if not isinstance(logits, Tensor):
        raise ClientDataError(
            f"the model returns a {type(output).__name__} without logits: return the logits, or "
            "give compute_loss(model, batch)"
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ClientDataError(
            f"labels are {kind}, cross-entropy takes class indices: give integers, or "
            "compute_loss(model, batch) for regression and soft labels"
        )
    classes_last, targets = _aligned(logits, labels)
    targets = targets.long()
    try:
        mean = F.cross_entropy(classes_last, targets)
    except IndexError as error:
        raise ClientDataError(
            f"a label is not in [0, {classes_last.shape[1]}), the model's classes ({error}): count "
            "labels from 0, and give the model an output for each"
        ) from None
    return Loss(mean, logits, _counted(targets))


def _counted(targets: Tensor) -> Tensor | float:
    """How many class indices count. A small net's step notices how this is found."""
    size = targets.numel()
    if size and targets.device.type == "cpu" and not _mapped(targets):
        least = int(targets.min())  # of those that cross-entropy took, only IGNORED is negative
        if least >= 0:
            return float(size)
    return targets.ne(IGNORED).sum()


def _mapped(tensor: Tensor) -> bool:
    """Whether a tensor is of several clients, so that its content may not be asked for."""
    return torch._C._are_functorch_transforms_active() or has_torch_function((tensor,))


def _aligned(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels as cross-entropy takes them."""
    if logits.dim() == 2 and labels.shape == logits.shape[:1] and logits.shape[1] > 1:
        return logits, labels
    shapes = f"logits have the shape {tuple(logits.shape)}, labels {tuple(labels.shape)}"
    candidates = [labels]
    if labels.dim() > 1 and labels.shape[-1] == 1:
        candidates.append(labels.squeeze(-1))
    for targets in candidates:
        last = targets.shape == logits.shape[:-1]
        second = targets.shape == logits.shape[:1] + logits.shape[2:]
        if logits.dim() < 2 or not (last or second):
            continue
        if last and second and logits.dim() > 2:
            raise ClientDataError(
                f"{shapes}: classes may be either dimension; give compute_loss(model, batch)"
            )
        if logits.shape[1 if second else -1] == 1:
            raise ClientDataError(
                f"{shapes}: cross-entropy of one class is always 0; give the model an output for "
                "each class, or compute_loss(model, batch)"
            )
        if second:
            return logits, targets
        return logits.flatten(0, -2), targets.flatten()
    raise ClientDataError(
        f"{shapes}: give one class index for each row, or for each position of (N, …, C) logits; "
        "or compute_loss(model, batch)"
    )


def terms_of(model: nn.Module, batch: Mapping[str, Any], logits: Any) -> Tensor | None:
    """Of how many terms a transformers model's own loss is the mean; None: of rows.

    Of labels that are not -100, next tokens from the second one on, where the model's declared
    ``loss_type`` is such a mean.
    """
    config: Any = model.config
    kind = getattr(model, "loss_type", None)
    shifted = batch.get("shift_labels")
    labels = batch.get("labels") if shifted is None else shifted
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    ignored = IGNORED
    if kind == "ForSemanticSegmentation":
        ignored = getattr(config, "semantic_loss_ignore_index", 255)
    elif kind in _OF_NEXT_TOKENS:
        # A prefix of virtual tokens predicts the first label too; logits are longer then.
        prefixed = isinstance(logits, Tensor) and logits.shape[1:2] != labels.shape[1:2]
        encoded = getattr(config, "is_encoder_decoder", False)
        if shifted is None and labels.dim() > 1 and not encoded and not prefixed:
            labels = labels[..., 1:]
    elif kind not in _OF_LABELS or getattr(config, "num_labels", 2) == 1:  # 1: a regression
        return None
    return labels.ne(ignored).sum()


def _entry(output: Any, name: str) -> Any:
    """An output's entry, or attribute, None where it has none."""
    if isinstance(output, Mapping):
        return output.get(name)
    return None if isinstance(output, Tensor) else getattr(output, name, None)


def _taken(model: nn.Module) -> frozenset[str] | None:
    """Names of a model's inputs; None: it takes any."""
    get_base = getattr(model, "get_base_model", None)  # PEFT's wrappers take and pass on anything
    forward: Any = (get_base() if callable(get_base) else model).forward
    return _named_inputs(getattr(forward, "__func__", forward))


@functools.lru_cache(maxsize=64)
def _named_inputs(forward: Callable[..., Any]) -> frozenset[str] | None:
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return None
    return frozenset(p.name for p in parameters) - {"self"}
