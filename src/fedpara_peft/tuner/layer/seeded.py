"""A layer whose base weight and first factors are drawn from a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...maths.starts.seeded import base_digest, seeded_base, seeded_halves
from ..config import FedParaConfig
from ..errors import CheckpointError
from .factors import factor_shapes


class SeededLayer:
    """Part of :class:`~fedpara_peft.tuner.layer.FedParaLayer`: W = (W_seed − P(θ₀)) + P(θ)."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @torch.no_grad()
    def draw_from_seed(self, adapter_name: str, key: str, config: FedParaConfig) -> None:
        """Put the base W_seed − P(θ₀) in the base layer's place, and θ₀ into the factors.

        Args:
            adapter_name: the adapter.
            key: the layer's name in the model, which its draw depends on.
            config: has the seed and the response; its ``base_digest`` is compared or filled in.

        Raises:
            CheckpointError: the base is not the one that the configuration was saved with.
        """
        spec = self.specs[adapter_name]
        digests = config.base_digest = {} if config.base_digest is None else config.base_digest
        for name, plan in spec.plans.items():
            where, seed = f"{key}.{name}", config.base_seed
            std = spec.form.std_for_response(
                config.response, plan.r, kernel=bool(plan.kernel), at_zero=spec.form.local_halves
            )
            sizes = [factor_shapes(plan)] * spec.form.num_halves
            drawn = seeded_halves(seed, where, sizes, std, at_zero=spec.form.local_halves)
            base = seeded_base(seed, where, plan.shape.variance, drawn, spec.form)
            if self.zero_row is not None:
                base[self.zero_row] = 0
            digest = base_digest(base)
            if digests.setdefault(where, digest) != digest:
                raise CheckpointError(
                    f"{where}: base_seed={seed} gives a base with digest {digest} "
                    f"here, and the configuration says {digests[where]}: its factors "
                    "belong to another base. Use the versions of this package and of numpy that "
                    "the adapter was trained with; a configuration that has served another model "
                    "needs base_digest=None"
                )
            self._set_frozen(name, base)
            for factors, values in zip(self.halves(adapter_name, name), drawn, strict=True):
                for factor, value in zip(factors.tensors(), values.tensors(), strict=True):
                    if not factor.is_meta:
                        factor.copy_(value)
        self.note_drawn_local_half(adapter_name)

    def _set_frozen(self, name: str, base: Tensor) -> None:
        base_layer = self.get_base_layer()
        old = getattr(base_layer, name)
        laid = base.reshape(old.T.shape).T if self.transposed else base.reshape(old.shape)
        device = torch.device("cpu") if old.is_meta else old.device
        new = torch.nn.Parameter(laid.contiguous().to(device, old.dtype), requires_grad=False)
        # Not by setattr: PEFT has what is registered in injection put on the meta device.
        base_layer._parameters[name] = new
