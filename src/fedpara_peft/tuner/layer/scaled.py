"""The scale of an adapter's ΔW, and how it is changed and changed back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError


class ScaledLayer:
    """Part of :class:`~fedpara_peft.tuner.layer.FedParaLayer`: what PEFT calls scaling."""

    r: dict[str, int]
    alpha: dict[str, float]
    scaling: dict[str, float]
    _rank_stabilized: dict[str, bool]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def own_scale(self, adapter: str) -> float:
        """The scale that the configuration gives: ``alpha / r``, ``alpha / √r`` with rslora."""
        r = self.r[adapter]
        return self.alpha[adapter] / (math.sqrt(r) if self._rank_stabilized[adapter] else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter to ``scale · alpha / r`` (``alpha / √r`` with rslora)."""
        if adapter in self.specs:
            self._refuse_from_scratch("set_scale", "there is no W₀ to scale against")
            self._rescale(adapter, scale * self.own_scale(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for name in self.active_adapters:
            if scale == 1 or name not in self.specs:
                continue
            self._refuse_from_scratch("scale_layer", "there is no W₀ to scale against")
            nonzero, zeros = self._scale_parts(name)
            if scale == 0:
                self._rescale(name, nonzero, zeros + 1)
            else:
                self._rescale(name, nonzero * scale, zeros)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo :meth:`scale_layer`, by zero too; without ``scale`` go back to ``alpha / r``.

        Raises:
            ConfigError: ``scale`` is zero and the adapter has not been scaled by zero.
        """
        for name in self.active_adapters:
            if scale == 1 or name not in self.specs:
                continue
            if scale is None:
                self._rescale(name, self.own_scale(name))
                continue
            self._refuse_from_scratch("unscale_layer", "there is no W₀ to scale against")
            nonzero, zeros = self._scale_parts(name)
            if scale != 0:
                self._rescale(name, nonzero / scale, zeros)
            elif zeros:
                self._rescale(name, nonzero, zeros - 1)
            else:
                raise ConfigError(
                    f"unscale_layer(0) undoes scale_layer(0), and adapter {name} has not been "
                    f"scaled by 0 (its scale is {self.scaling[name]}): leave the argument out to "
                    "go back to alpha / r"
                )

    # A scale of zero says nothing of what it was before: that product is kept beside it.

    def _scale_parts(self, name: str) -> tuple[float, int]:
        """The product of the scale's factors that are not zero, and how many are."""
        if self.scaling[name] == 0 and name in self._zeroed:
            nonzero, zeros = self._zeroed[name]
            return float(nonzero), int(zeros)
        return self.scaling[name], 0

    def _rescale(self, name: str, nonzero: float, zeros: int = 0) -> None:
        self.scaling[name] = 0.0 if zeros else nonzero
        self._zeroed.pop(name, None)
        if zeros:
            self._zeroed[name] = (nonzero, zeros)
