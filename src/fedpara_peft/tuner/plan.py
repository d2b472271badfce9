"""Which weights of a layer are factorized, and at which rank; decided before injection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..maths.apply import form_rank
from ..maths.rank import matching_rank, parameter_count, rank_bounds, rank_for_gamma
from .config import FedParaConfig
from .names import value_for


@dataclass(frozen=True)
class WeightShape:
    """A weight that can be factorized, as the maths sees it.

    Attributes:
        out_features: M.
        in_features: N (input channels of one group for a grouped convolution).
        kernel: kernel size, empty for a matrix.
        variance: the variance that a freshly initialized weight of this kind shall have.
    """

    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    variance: float = 1.0

    @property
    def numel(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features * math.prod(self.kernel)


@dataclass(frozen=True)
class WeightPlan:
    """How one weight is factorized.

    Attributes:
        shape: the dense weight.
        r: inner rank.
        rows: M, rows of X.
        columns: rows of Y: N, or ``N · K`` where a kernel is reshaped to a matrix (Prop. 1).
        kernel: kernel of the core T (Prop. 3); empty where there is none.
        parameters: number of factor entries.
        form_parameters: number of entries of the weight's low-rank form.
    """

    shape: WeightShape
    r: int
    rows: int
    columns: int
    kernel: tuple[int, ...]
    parameters: int
    form_parameters: int


def plan_layer(
    config: FedParaConfig, key: str, shapes: Mapping[str, WeightShape]
) -> dict[str, WeightPlan]:
    """Plan the weights of one layer; a weight that stays dense is left out.

    From scratch a weight stays dense where factorizing saves nothing: with γ where
    ``r_max < r_min``, with a given rank where the factors would outnumber the weight. A frozen
    base weight is never in question: there γ on a tiny weight gives ``max(1, r_max)``.

    Args:
        config: the adapter's configuration.
        key: full name of the module, for ``rank_pattern``.
        shapes: the layer's weights by name.

    Raises:
        ConfigError: patterns that are equally specific give the layer different ranks.
    """
    plans = {}
    for name, shape in shapes.items():
        plan = _plan_weight(config, key, shape)
        if plan is not None:
            plans[name] = plan
    return plans


def alpha_for(config: FedParaConfig, key: str) -> float | None:
    """The alpha of a layer, by ``alpha_pattern``; None means scale 1.

    Raises:
        ConfigError: patterns that are equally specific give the layer different alphas.
    """
    found = value_for(config.alpha_pattern, key, "alpha_pattern")
    return config.alpha if found is None else found


def _plan_weight(config: FedParaConfig, key: str, shape: WeightShape) -> WeightPlan | None:
    m, n, kernel = shape.out_features, shape.in_features, shape.kernel
    if not config.use_effective_conv2d or math.prod(kernel) == 1:
        n, kernel = n * math.prod(kernel), ()
    explicit = value_for(config.rank_pattern, key, "rank_pattern")
    if explicit is not None or config.gamma is None:
        r = config.r if explicit is None else explicit
    else:
        low, high = rank_bounds(m, n, kernel)
        if low <= high:
            r = rank_for_gamma(config.gamma, m, n, kernel)
        elif config.from_scratch:
            return None
        else:
            r = max(1, high)
        r = matching_rank(r, m, n, kernel, config.parameterization)
    count = parameter_count(r, m, n, kernel, config.parameterization)
    if config.from_scratch and count > shape.numel:
        return None
    rank = form_rank(r, config.parameterization)
    form = rank * (m + n) + (rank * rank * math.prod(kernel) if kernel else 0)
    return WeightPlan(shape, r, m, n, kernel, count, form)
