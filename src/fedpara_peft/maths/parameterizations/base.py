"""What a parameterization says about itself, and all that follows from it.

A weight is a sum of Hadamard products of low-rank *halves*:

    W = Σ_terms ⊙_{i in term} W_i          pfedpara: W₁ ⊙ W₂ + W₁, the terms (0, 1) and (0,)

The terms alone say how halves compose, which rank they reach, and what the weight's low-rank form
and its gradients are. How halves are drawn is said beside them, for it is a choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RankError
from ..halves import Half, LowRankForm, block_diagonal, khatri_rao, kronecker

#: tanh bounds |W| below 1, so a target variance above this is lowered to it.
TANH_VARIANCE_CAP = 0.25


@dataclass(frozen=True)
class Parameterization:
    """A form of a weight.

    Args:
        name: what a configuration calls it.
        formula: the weight, for texts.
        terms: the indices of the halves that each term multiplies; a half may stand more than once.
        zero_halves: the halves whose X is zero at the start beside a frozen weight. Every term must
            hold one, so that ΔW = 0, and some term one factor of them alone: where all hold two or
            more, no gradient leaves that point.
        local_halves: halves that stay on the client. A weight without them, where they are zero,
            must be left.
        variances: from the composed weight's variance, and whether halves are activated by tanh, to
            the variance of each (activated) half. None: ``v^(1/n)`` of a product of n halves.

    Raises:
        RankError: the terms cannot be learned so.
    """

    name: str
    formula: str
    terms: tuple[tuple[int, ...], ...]
    zero_halves: tuple[int, ...]
    local_halves: tuple[int, ...] = ()
    variances: Callable[[float, bool], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        used = {i for term in self.terms for i in term}
        if not self.terms or not all(self.terms) or used != set(range(len(used))):
            raise RankError(
                f"{self.name}: the terms {self.terms} must name halves 0, 1, … without a gap"
            )
        if not all(set(term) & set(self.zero_halves) for term in self.terms):
            raise RankError(
                f"{self.name}: with X = 0 in the halves {self.zero_halves} alone, ΔW does not "
                f"start as 0: every term of {self.terms} must hold one of them"
            )
        if not self._moving_terms():
            raise RankError(
                f"{self.name}: with X = 0 in the halves {self.zero_halves} no term of {self.terms} "
                "has a gradient: choose halves that some term holds exactly once"
            )
        if not self.shared_terms:
            raise RankError(
                f"{self.name}: nothing is left of {self.terms} without the local halves "
                f"{self.local_halves}: add a term of global halves alone"
            )
        if self.variances is None and (len(self.terms) > 1 or len(self.terms[0]) > len(used)):
            raise RankError(
                f"{self.name}: {self.terms} is no single product of different halves, so say by "
                "`variances` how the weight's variance is shared among its halves"
            )

    # Shape.

    @property
    def num_halves(self) -> int:
        """Halves that a weight is composed of."""
        return 1 + max([max(term) for term in self.terms])

    @property
    def multiplies(self) -> bool:
        """Whether halves are multiplied with one another: activating them has a meaning then."""
        return any(len(term) > 1 for term in self.terms)

    @property
    def is_multilinear(self) -> bool:
        """Whether the weight is linear in every half: none is multiplied with itself."""
        return all(len(set(term)) == len(term) for term in self.terms)

    @property
    def shared_terms(self) -> tuple[tuple[int, ...], ...]:
        """The terms without local halves: what the server's factors compose to."""
        return tuple(t for t in self.terms if not set(t) & set(self.local_halves))

    # Composing.

    def combine(
        self,
        parts: Sequence[Tensor],
        scale: float = 1.0,
        base: Tensor | None = None,
        *,
        shared: bool = False,
    ) -> Tensor:
        """``base + scale · W`` of the (activated) composed halves.

        Args:
            parts: the composed halves.
            scale: factor on W.
            base: tensor of W's shape to add to, None for zero; not modified.
            shared: leave the terms with local halves out.
        """
        total = base
        for term in reversed(self.shared_terms if shared else self.terms):
            product = parts[term[0]]
            for i in term[1:]:
                product = product * parts[i]
            if total is None:
                total = product if scale == 1 else product * scale
            elif scale == 1 and len(term) > 1:  # addcmul's gradients take twice the passes
                total = product.add_(total)
            else:
                total = torch.add(total, product, alpha=scale)
        assert total is not None
        return total

    def reachable_rank(self, ranks: Sequence[int]) -> int:
        """Largest rank of the composed matrix by the ranks of its halves.

        A product has the product of its halves' ranks; the m-th power of one half
        ``C(r + m - 1, m)``, the number of its different products of columns.
        """
        return sum(
            math.prod(math.comb(ranks[i] + (m := term.count(i)) - 1, m) for i in set(term))
            for term in self.terms
        )

    # The low-rank form.

    def form_rank(self, ranks: Sequence[int]) -> int:
        """R, the number of columns of the low-rank form."""
        return sum(self._columns(ranks))

    def low_rank_form(self, halves: Sequence[Half]) -> LowRankForm:
        """The weight as one product: the terms' Khatri–Rao products side by side."""
        forms = [_term_form([halves[i] for i in term]) for term in self.terms]
        a, b, core = forms[0]
        if len(forms) > 1:
            a, b = torch.cat([f.a for f in forms], 1), torch.cat([f.b for f in forms], 1)
            if core is not None:
                core = block_diagonal([f.core for f in forms if f.core is not None])
        return LowRankForm(a, b, core)

    def factor_gradients(
        self, grad_a: Tensor, grad_b: Tensor, halves: Sequence[Half]
    ) -> list[Tensor | None]:
        """From the gradients of the form's A and B to those of X₁, Y₁(, X₂, Y₂, …)."""
        columns = self._columns([half.x.shape[1] for half in halves])
        of_x = self._split(grad_a, [half.x for half in halves], columns)
        of_y = self._split(grad_b, [half.y for half in halves], columns)
        return [grad for pair in zip(of_x, of_y, strict=True) for grad in pair]

    def by_rows(self, x: Tensor, halves: Sequence[Half]) -> Tensor:
        """``x Wᵀ`` for a few rows x; see :func:`~fedpara_peft.maths.apply.by_rows`."""
        total: Tensor | None = None
        for term in self.terms:
            part = _term_by_rows(x, [halves[i] for i in term])
            total = part if total is None else total + part
        assert total is not None
        return total

    # Starts.

    def half_variances(self, variance: float, tanh: bool) -> tuple[float, ...]:
        """Variance of each (activated) half so that the composed weight has ``variance``."""
        if self.variances is not None:
            return self.variances(variance, tanh)
        n = self.num_halves
        return (variance ** (1 / n),) * n

    def identity_start_stds(
        self, r: int, fan_in: int, *, kernel: bool
    ) -> list[tuple[float, float, float]]:
        """Std of X, Y and T of each half beside a frozen weight; then X of `zero_halves` is zero.

        Of the terms that move at once the first has n halves, one of them zero. It is made of a
        LoRA: Y (in a kernel the core T, with a Y that keeps variances) is drawn as LoRA's A is,
        ``Var Y = 1 / 3N``, X takes the place of its B, and the other halves' product has variance
        n. So the first step η on a gradient G is that of a LoRA of as many values, whose rank is
        n r, ``ΔW ≈ η G n r / 3N``, and so are those after it, in which Y grows as A does.
        """
        small = math.sqrt(1 / (3 * fan_in))
        found = []
        for half in range(self.num_halves):
            n = next((len(term) for term in self._moving_terms() if half in term), 1)
            v = n ** (1 / (n - 1)) if n > 1 else 1.0
            large = (v / r**2) ** (1 / 6) if kernel else (v / r) ** (1 / 4)
            if half not in self.zero_halves:
                found.append((large, large, large))
            else:
                found.append((large, r**-0.5, small) if kernel else (large, small, 0.0))
        return found

    def response(self, r: int, std: float, *, kernel: bool, at_zero: Sequence[int] = ()) -> float:
        """How far one SGD step moves the weight, where a dense weight has 1.

        The mean of the diagonal of ``Σ_f J_f J_fᵀ``, J_f the weight's Jacobian in the factor f, at
        independent factors of one variance:

            c = Σ_terms Σ_{i in term} c_i ∏_{j in term, j ≠ i} v_j

        A half has variance ``v = r σ⁴`` (kernel: ``r² σ⁶``) and, as each factor gives ``v / σ²``,
        ``c = 2 v / σ²`` (``3 v / σ²``). One whose X is zero has v = 0, and only X moves it.

        Args:
            r: inner rank.
            std: σ of all factors.
            kernel: whether the halves have cores.
            at_zero: halves whose X is zero.

        Raises:
            RankError: a term holds a half twice.
        """
        if not self.is_multilinear:
            raise RankError(f"{self.name}: the response of powers of a half is not known")
        square = std * std  # no powers: their last bit is the C library's
        each = r * r * square * square if kernel else r * square
        variances = [0.0 if i in at_zero else each * square for i in range(self.num_halves)]
        factors = 3 if kernel else 2
        moved = [each if i in at_zero else factors * each for i in range(self.num_halves)]
        return sum(
            moved[i] * math.prod([variances[j] for j in term if j != i])
            for term in self.terms
            for i in term
        )

    def std_for_response(
        self, response: float, r: int, *, kernel: bool, at_zero: Sequence[int] = ()
    ) -> float:
        """σ of all factors at which the weight has a wanted :meth:`response`."""
        low, high = 0.0, 1.0
        while self.response(r, high, kernel=kernel, at_zero=at_zero) < response:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            reached = self.response(r, middle, kernel=kernel, at_zero=at_zero) >= response
            low, high = (low, middle) if reached else (middle, high)
        return high

    # Private.

    def _moving_terms(self) -> list[tuple[int, ...]]:
        """The terms with a gradient at the start: those with one factor that is zero."""
        return [t for t in self.terms if sum(i in self.zero_halves for i in t) == 1]

    def _columns(self, ranks: Sequence[int]) -> list[int]:
        return [math.prod([ranks[i] for i in term]) for term in self.terms]

    def _split(self, grad: Tensor, factors: Sequence[Tensor], columns: list[int]) -> list[Tensor]:
        found: list[Tensor | None] = [None] * len(factors)
        grads = torch.split(grad, columns, 1) if len(columns) > 1 else (grad,)
        for term, rest in zip(self.terms, grads, strict=True):
            for n in range(len(term) - 1, 0, -1):  # rest is the gradient of (… ⋆ …) ⋆ last
                left, last = _khatri_rao([factors[i] for i in term[:n]]), factors[term[n]]
                product = rest.reshape(-1, left.shape[1], last.shape[1])
                rest = torch.matmul(product, last.unsqueeze(2)).squeeze(2)
                own = (product * left.unsqueeze(2)).sum(1)  # a matmul is slower this way round
                found[term[n]] = _sum(found[term[n]], own)
            found[term[0]] = _sum(found[term[0]], rest)
        return [grad for grad in found if grad is not None]


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = khatri_rao(product, factor)
    return product


def _term_form(halves: Sequence[Half]) -> LowRankForm:
    core = halves[0].t
    for half in halves[1:]:
        core = None if core is None or half.t is None else kronecker(core, half.t)
    return LowRankForm(
        _khatri_rao([half.x for half in halves]), _khatri_rao([half.y for half in halves]), core
    )


def _term_by_rows(x: Tensor, halves: Sequence[Half]) -> Tensor:
    if len(halves) == 2:
        first, second = halves
        h = (x.unsqueeze(2) * first.y).transpose(1, 2) @ second.y  # (T, r₁, r₂)
        return ((first.x @ h) * second.x).sum(2)
    form = _term_form(halves)
    return (x @ form.b) @ form.a.T
