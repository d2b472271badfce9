"""What a weight has beside its base and its product: a dense tensor that only a server moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

#: The container of remainders; maps adapter to weight to tensor.
REMAINDER_CONTAINER = "fedpara_remainder"


class RemainderLayer:
    """Part of :class:`~fedpara_peft.tuner.layer.FedParaLayer`: W = W₀ + s · (P(θ) + R).

    R has the base weight's shape. It is no parameter: a mean of clients' weights is in general not
    of the form P(θ), and R is what it has beside it (see ``federation/server/averaging/exact.py``).
    """

    fedpara_remainder: nn.ModuleDict

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def hold_remainder(self, adapter_name: str) -> None:
        """Give the adapter's weights remainders of zero; those that it has stay."""
        if adapter_name in self.fedpara_remainder:
            return
        spec = self.specs[adapter_name]
        found = {}
        for name, plan in spec.plans.items():
            factor = self.halves(adapter_name, name)[0].x
            dtype = torch.promote_types(factor.dtype, torch.float32)
            size = self._laid_out(plan)
            found[name] = torch.zeros(size, dtype=dtype, device=factor.device)
        self.fedpara_remainder[adapter_name] = BufferDict(found, persistent=True)

    def remainder(self, adapter_name: str, name: str = "weight") -> Tensor | None:
        """The remainder of one weight in the base layer's layout; None if the adapter has none."""
        if adapter_name not in self.fedpara_remainder:
            return None
        kept: Any = self.fedpara_remainder[adapter_name]
        found: Tensor = kept[name]
        return found

    def _plus_remainder(
        self, weight: Tensor, adapter_name: str, name: str, scale: float | None = None
    ) -> Tensor:
        """A composed weight with the remainder on it, at the composed weight's scale."""
        rest = self.remainder(adapter_name, name)
        if rest is None:
            return weight
        scale = self.scale_of(adapter_name) if scale is None else scale
        return torch.add(weight, rest.to(weight.dtype), alpha=scale)
