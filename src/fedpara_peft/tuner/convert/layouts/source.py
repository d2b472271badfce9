"""Reading an adapter file: checked by its header alone, then layer by layer."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ....maths.halves import Half
from ....maths.parameterizations import FEDPARA, LOWRANK
from ...errors import LayoutError
from .keys import ALPHA, DORA, LOHA, LORA, Group, group_keys, layout_of
from .layer import Layer, loha_half
from .stream import TensorFile, TensorInfo

#: Methods whose layers are read; those of others are named.
READ = ("LoHa", "LoRA")


@dataclass(frozen=True)
class FoundLayer:
    """A layer by its file's header.

    Attributes:
        group: its keys.
        rank: r; None for a method that is not read.
    """

    group: Group
    rank: int | None


class AdapterFile:
    """A safetensors file of adapters in any layout that is known, detected by its keys.

    Args:
        path: the file.

    Attributes:
        layers: what the file has, in its order.
        rest: keys that are no layer's.
        layout: who writes files so.
        metadata: the file's own.

    Raises:
        LayoutError: the file is damaged, or a layer is; the message names the key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = TensorFile(path)
        try:
            groups, self.rest = group_keys(self.file.tensors)
            self.layout = layout_of(groups)
            self.layers = [FoundLayer(group, self._check(group)) for group in groups]
        except BaseException:
            self.file.__exit__()
            raise

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return self.file.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What the header says of each tensor."""
        return self.file.tensors

    def alpha_of(self, layer: FoundLayer) -> float | None:
        """A layer's alpha; None where the file has none.

        Raises:
            LayoutError: it is zero or no number, by which programs mean different things.
        """
        key = layer.group.keys.get(ALPHA)
        if key is None:
            return None
        alpha = float(self.file.read(key).float().reshape(()))
        if not math.isfinite(alpha) or alpha == 0:
            raise LayoutError(
                f"{key} is {alpha}, which programs take for different scales: set it to the rank "
                "for scale 1"
            )
        return alpha

    def shape_of(self, layer: FoundLayer) -> tuple[int, ...]:
        """The weight that a layer adds to, as far as its factors tell; () for other methods."""
        group = layer.group
        if group.method == "LoHa":
            core = LOHA[0][2]
            a, b = (self._shape(group, name) for name in LOHA[0][:2])
            if core in group.keys:
                return (a[1], b[1], *self._shape(group, core)[2:])
            return (a[0], b[1])
        if group.method == "LoRA":
            up, down, mid = _lora_names(group)
            rows, columns = self._shape(group, up)[0], self._shape(group, down)[1]
            return (rows, columns, *self._shape(group, mid if mid in group.keys else down)[2:])
        return ()

    def read(self, layer: FoundLayer, alpha: float | None = None) -> Layer:
        """A layer with its values.

        Args:
            layer: one of :attr:`layers`, of a method in :data:`READ`.
            alpha: its alpha where the file has none; None: the rank, for scale 1.

        Raises:
            LayoutError: a factor is not finite.
        """
        group = layer.group
        assert layer.rank is not None
        own = {factor: self._finite(key) for factor, key in group.keys.items()}
        dtypes = [f.dtype for name, f in own.items() if name not in (ALPHA, DORA)]
        dtype = functools.reduce(torch.promote_types, dtypes)
        own |= {name: f.to(dtype) for name, f in own.items() if name not in (ALPHA, DORA)}
        found = self.alpha_of(layer)
        if found is None:
            found = float(layer.rank) if alpha is None else alpha
        kernel = None
        if group.method == "LoHa":
            name = FEDPARA.name
            halves = tuple(loha_half(own, names) for names in LOHA)
        else:
            name = LOWRANK.name
            up, down, mid = (own.get(factor) for factor in _lora_names(group))
            assert up is not None
            assert down is not None
            halves = (Half(up.flatten(1), down.flatten(1).T, mid),)
            kernel = tuple(down.shape[2:]) if mid is None else None
        return Layer(
            name=group.name,
            component=group.prefix.component,
            underscored=group.prefix.underscored,
            parameterization=name,
            halves=halves,
            rank=layer.rank,
            alpha=found,
            kernel=kernel,
            alpha_tensor=own.get(ALPHA),
            dora_scale=own.get(DORA),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.__exit__()

    def _finite(self, key: str) -> Tensor:
        tensor = self.file.read(key)
        if not bool(torch.isfinite(tensor.float()).all()):
            raise LayoutError(f"{key} has values that are not finite: save the adapter again")
        return tensor

    # What the header alone can say.

    def _check(self, group: Group) -> int | None:
        if ALPHA in group.keys and math.prod(self._shape(group, ALPHA)) != 1:
            raise self._wrong(group, ALPHA, "one number")
        if group.method == "LoHa":
            return self._check_loha(group)
        return self._check_lora(group) if group.method == "LoRA" else None

    def _check_loha(self, group: Group) -> int:
        for factor in group.keys:
            if factor == "scalar":
                raise self._wrong(group, factor, "folded into hada_w1_a, as LyCORIS saves it")
            self._check_float(group, factor)
        cores = [names[2] for names in LOHA if names[2] in group.keys]
        self._check_whole(group, [*LOHA[0][:2], *LOHA[1][:2], *(n[2] for n in LOHA if cores)])
        first = LOHA[0][1]
        self._check_dims(group, first, 2)
        r = self._shape(group, first)[0]
        # With cores every factor begins with r; without, the left one is (M, r).
        r_first = (True, True) if cores else (False, True)
        outer = tuple(self._outer(group, LOHA[0][i], r, r_first[i]) for i in (0, 1))
        for names in LOHA:
            for i in (0, 1):
                found = self._outer(group, names[i], r, r_first[i])
                if found != outer[i]:
                    raise self._wrong(group, names[i], f"of {outer[i]}, as {LOHA[0][i]} is")
        for core in cores:
            shape = self._shape(group, core)
            if not 3 <= len(shape) <= 5 or shape[:2] != (r, r) or 0 in shape:
                raise self._wrong(group, core, f"({r}, {r}, *kernel) of a kernel in 1 to 3 dims")
            if shape != self._shape(group, cores[0]):
                raise self._wrong(group, core, f"of the shape that {cores[0]} has")
        return r

    def _check_lora(self, group: Group) -> int:
        for factor in group.keys:
            self._check_float(group, factor)
        up, down, mid = _lora_names(group)
        self._check_whole(group, [up, down])
        alien = set(group.keys) - {up, down, mid, ALPHA, DORA}
        if alien:
            raise self._wrong(group, min(alien), f"beside {up} and {down}, or not at all")
        u, d = self._shape(group, up), self._shape(group, down)
        if not 2 <= len(d) <= 5 or 0 in d:
            raise self._wrong(group, down, "(r, N) or (r, N, *kernel)")
        if len(u) < 2 or u[1:] != (d[0], *[1] * (len(u) - 2)) or 0 in u:
            raise self._wrong(group, up, f"(M, {d[0]}), for {down} has rank {d[0]}")
        if mid in group.keys:
            m = self._shape(group, mid)
            if len(m) < 3 or m[:2] != (d[0], d[0]) or 0 in m or math.prod(d[2:]) != 1:
                raise self._wrong(group, mid, f"({d[0]}, {d[0]}, *kernel)")
        return d[0]

    def _check_whole(self, group: Group, wanted: list[str]) -> None:
        missing = [factor for factor in wanted if factor not in group.keys]
        if missing:
            has = ", ".join(group.keys)
            raise LayoutError(
                f"{group.module} lacks {' and '.join(missing)} (it has {has}): the file is "
                "damaged; save or fetch it again"
            )

    def _check_float(self, group: Group, factor: str) -> None:
        dtype = self.tensors[group.keys[factor]].dtype
        if factor != ALPHA and not (dtype.is_floating_point and dtype.itemsize > 1):
            key = group.keys[factor]
            raise LayoutError(f"{key} is {dtype}: save the factors in 16 bits or more")

    def _check_dims(self, group: Group, factor: str, dims: int) -> None:
        shape = self._shape(group, factor)
        if len(shape) != dims or 0 in shape:
            raise self._wrong(group, factor, "a matrix" if dims == 2 else f"of {dims} dimensions")

    def _outer(self, group: Group, factor: str, r: int, r_first: bool) -> int:
        """The dimension of a factor that is not the rank."""
        self._check_dims(group, factor, 2)
        shape = self._shape(group, factor)
        inner, outer = shape if r_first else shape[::-1]
        if inner != r:
            where = f"({r}, …)" if r_first else f"(…, {r})"
            raise self._wrong(group, factor, f"{where}, for {LOHA[0][1]} has rank {r}")
        return outer

    def _shape(self, group: Group, factor: str) -> tuple[int, ...]:
        return self.tensors[group.keys[factor]].shape

    def _wrong(self, group: Group, factor: str, wanted: str) -> LayoutError:
        key = group.keys[factor]
        return LayoutError(
            f"{key} is {self.tensors[key].shape} and should be {wanted}: the file is damaged; "
            "save or fetch it again"
        )


def _lora_names(group: Group) -> tuple[str, str, str]:
    """The names of up, down and core that a layer's keys are of."""
    return next(names for names in LORA if set(names) & set(group.keys))
