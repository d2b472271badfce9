"""Writing composed weights into the base layer, and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...maths.compose import add_composed_


class MergedLayer:
    """Part of :class:`~fedpara_peft.tuner.layer.FedParaLayer`: merging, and freeing W₀."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def free_base_weights(self) -> None:
        """Drop the dense weights that composed ones replace, and the memory with them."""
        for name in next(iter(self.specs.values())).plans:
            setattr(self.get_base_layer(), name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the composed weight into the base layer.

        Args:
            safe_merge: refuse, with nothing changed, a result that is not finite.
            adapter_names: adapters to merge; all active ones by default.

        Raises:
            ValueError: ``safe_merge`` found NaN or infinity.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.specs:
                with self._trainable_afterwards():
                    self._merge(adapter_name, safe_merge)

    def _merge(self, adapter_name: str, safe: bool) -> None:
        names = list(self.specs[adapter_name].plans)
        if self.specs[adapter_name].base_weight == "seeded":
            self._seeded_bases = {n: self._get_base_tensor(n).clone() for n in names}
        merged = {name: self._merged(adapter_name, name, safe) for name in names}
        for name, weight in merged.items():
            self._set_base_tensor(name, weight)
        self.merged_adapters.append(adapter_name)
        self._merged_scales[adapter_name] = self.scale_of(adapter_name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base layer again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._trainable_afterwards():
            self._unmerge()

    def base_without_adapters(self, name: str) -> Tensor:
        """A base weight as it was before adapters were merged into it; a copy, up to rounding."""
        base = self._get_base_tensor(name).clone()
        for adapter_name in self.merged_adapters:
            if adapter_name in self.specs:
                self._add_composed_(base, adapter_name, name, -self._merged_scales[adapter_name])
        return base

    def _unmerge(self) -> None:
        if self.replaced:
            self.free_base_weights()
            self.merged_adapters.clear()
            return
        if self._seeded_bases:  # a sum taken back would differ in its last bits
            for name, base in self._seeded_bases.items():
                self._set_base_tensor(name, base)
            self._seeded_bases.clear()
            self.merged_adapters.clear()
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if adapter_name not in self.specs:
                continue
            scale = self._merged_scales.pop(adapter_name)  # it may have been set anew since
            for name in self.specs[adapter_name].plans:
                base = self._get_base_tensor(name)
                self._add_composed_(base, adapter_name, name, -scale)
                self._set_base_tensor(name, base)

    @contextmanager
    def _trainable_afterwards(self) -> Iterator[None]:
        """What is made in here can be trained beside later, in ``torch.inference_mode`` too."""
        made_for_inference = any(factor.is_inference() for _, factor in self._factors())
        mode = nullcontext() if made_for_inference else torch.inference_mode(False)
        with mode, torch.no_grad():
            yield

    def _merged(self, adapter_name: str, name: str, safe: bool) -> Tensor:
        """The base weight with the composed one in it; in place unless it shall be checked."""
        spec = self.specs[adapter_name]
        if spec.replaced:
            x = self.halves(adapter_name, name)[0].x
            size = self._laid_out(spec.plans[name])
            weight = torch.zeros(size, dtype=x.dtype, device=x.device)
        else:
            weight = self._get_base_tensor(name)
            weight = weight.clone() if safe else weight
        self._add_composed_(weight, adapter_name, name, self.scale_of(adapter_name))
        if safe and not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(
                "NaNs detected in the merged weights. The adapter "
                f"{adapter_name} seems to be broken"
            )
        return weight

    def _add_composed_(self, weight: Tensor, adapter_name: str, name: str, scale: float) -> None:
        spec = self.specs[adapter_name]
        add_composed_(
            weight.T if self.transposed else weight,
            self.halves(adapter_name, name),
            spec.parameterization,
            spec.nonlinearity,
            scale=scale,
            zero_row=self.zero_row,
        )
        weight.copy_(self._plus_remainder(weight, adapter_name, name, scale))

    def _get_base_tensor(self, name: str) -> Tensor:
        if name == "weight":
            return self.get_base_weight()
        return getattr(self.get_base_layer(), name).data

    def _set_base_tensor(self, name: str, value: Tensor) -> None:
        base_layer = self.get_base_layer()
        if self.replaced:
            # What trains are the factors: a change of this weight would be lost on unmerging.
            setattr(base_layer, name, nn.Parameter(value, requires_grad=False))
        elif name == "weight":
            self.set_base_weight(value)
        else:
            if value is not (data := getattr(base_layer, name).data):
                data.copy_(value)
