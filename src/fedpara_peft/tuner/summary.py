"""A table of what is factorized, at which rank, and what is communicated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from torch import nn

from ..maths.compose import reachable_rank
from ._peft import is_key_under_prefixes
from .layer import FactorizedWeight, FedParaLayer, factorized_layers, factorized_weights
from .names import base_names
from .scope import Scope, tensor_scopes


@dataclass(frozen=True)
class SummaryRow:
    """One factorized weight, or the trained tensors of a module that stays dense.

    Attributes:
        name: name in the plain model.
        kind: layer kind, or the module's class where it stays dense.
        shape: the dense weight's shape; empty for a dense module.
        r: inner rank; None for a dense module.
        reachable: the largest rank the weight can reach, as ``reached/full`` over its output and
            its input unfolding; None for a dense module.
        parameters: trained entries.
        dense_parameters: entries of the dense weight.
        scope: global, local, or both.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    reachable: str | None
    parameters: int
    dense_parameters: int
    scope: str


@dataclass(frozen=True)
class Summary:
    """All rows; ``print`` shows the table."""

    rows: tuple[SummaryRow, ...]

    @property
    def parameters(self) -> int:
        """Trained entries of the model."""
        return sum(row.parameters for row in self.rows)

    @property
    def dense_parameters(self) -> int:
        """Entries that the same parts of the plain model have."""
        return sum(row.dense_parameters for row in self.rows)

    def __str__(self) -> str:
        header, *cells = self._table()
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        left = {0, 1, 8}
        return "\n".join(
            "  ".join(
                text.ljust(width) if i in left else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [header, *cells]
        )

    def _repr_html_(self) -> str:
        header, *cells = self._table()
        return html_table(cells, header)

    def _table(self) -> list[tuple[str, ...]]:
        """Header, a line for each row, and the total."""
        lines = [("weight", "kind", "shape", "r", "rank", "trained", "dense", "share", "scope")]
        for row in self.rows:
            share = f"{row.parameters / row.dense_parameters:.1%}"
            size = "x".join(map(str, row.shape)) or "-"
            r = "-" if row.r is None else str(row.r)
            counts = (f"{row.parameters:,}", f"{row.dense_parameters:,}")
            lines.append(
                (row.name, row.kind, size, r, row.reachable or "-", *counts, share, row.scope)
            )
        share = f"{self.parameters / self.dense_parameters:.1%}" if self.rows else "nan%"
        total = ("total", "", "", "", "", f"{self.parameters:,}", f"{self.dense_parameters:,}")
        return [*lines, (*total, share, "")]


def html_table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A table for notebooks; all text is escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(c))}</{tag}>' for c in cells)}</tr>"

    lines = [line(head, "th")] if head else []
    return "<table>\n" + "\n".join([*lines, *(line(row, "td") for row in rows)]) + "\n</table>"


def fedpara_summary(model: nn.Module, adapter_name: str | None = None) -> Summary:
    """Summarize what of a model is trained, layer by layer.

    Factorized weights first name their inner rank and the rank they can reach: a convolution at
    ``r_min`` with unequal channels reaches full rank in its smaller channel unfolding only, so both
    unfoldings are shown. Modules that stay dense (also those that factorizing would not make
    smaller) follow with the entries they train.

    Args:
        model: a model with FedPara adapters.
        adapter_name: adapter to describe; the active one by default.
    """
    scopes = tensor_scopes(model)
    parameters = dict(model.named_parameters())
    plain = base_names(model)
    rows: list[SummaryRow] = []
    factors: set[str] = set()
    for name, layer in factorized_layers(model):
        factors.update(f"{name}.{container}" for container in layer.adapter_layer_names)
    for found in factorized_weights(model, adapter_name):
        if adapter_name is not None or found.adapter in found.layer.active_adapters:
            own = [
                f"{found.name}.{container}.{found.adapter}.{found.weight}"
                for container in found.layer.adapter_layer_names
            ]
            own = [n for n in own if n in parameters]
            rows.append(_factorized_row(plain[found.name], found, own, scopes))
    for name, module in model.named_modules():
        if is_key_under_prefixes(name, factors):
            continue
        own = [
            f"{name}.{n}" if name else n
            for n, p in module.named_parameters(recurse=False)
            if p.requires_grad
        ]
        own = [n for n in own if n in scopes]
        if own:
            count = sum(parameters[n].numel() for n in own)
            # What a factorized layer keeps beside its factors is its biases.
            beside = isinstance(model.get_submodule(name.rpartition(".")[0]), FedParaLayer)
            kind = f"{type(module).__name__}, {'bias' if beside else 'dense'}"
            shown = plain[name] or "(model)"
            rows.append(SummaryRow(shown, kind, (), None, None, count, count, _scope(own, scopes)))
    return Summary(tuple(rows))


def _factorized_row(
    name: str,
    found: FactorizedWeight,
    own: list[str],
    scopes: Mapping[str, Scope],
) -> SummaryRow:
    spec, plan, shape = found.spec, found.plan, found.plan.shape
    ranks = [plan.r] * spec.form.num_halves
    bound = reachable_rank(ranks, spec.parameterization, spec.nonlinearity)
    k = math.prod(shape.kernel)
    # A kernel reshaped to a matrix (Prop. 1) has only its output unfolding bounded by the ranks.
    over_outputs = (shape.out_features, shape.in_features * k)
    over_inputs = (shape.in_features, shape.out_features * k)
    bounded = plan.kernel or k == 1
    reached = (
        min(*over_outputs, *([] if bound is None else [bound])),
        min(*over_inputs, *([bound] if bound is not None and bounded else [])),
    )
    full = (min(over_outputs), min(over_inputs))
    texts = [f"{r}/{f}" for r, f in zip(reached, full, strict=True)]
    return SummaryRow(
        name=name if found.weight == "weight" else f"{name}.{found.weight}",
        kind=found.layer.kind,
        shape=(shape.out_features, shape.in_features, *shape.kernel),
        r=plan.r,
        reachable=texts[0] if texts[0] == texts[1] else ", ".join(texts),
        parameters=plan.parameters,
        dense_parameters=shape.numel,
        scope=_scope(own, scopes) or "frozen",
    )


def _scope(names: list[str], scopes: Mapping[str, Scope]) -> str:
    return "+".join(sorted({str(scopes[n]) for n in names if n in scopes}))
