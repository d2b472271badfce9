"""For tests of what you write yourself: whether a codec keeps the promises that a run builds on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from .comm.codecs import Codec, codec_from_name
from .comm.errors import CodecError, PayloadError
from .comm.payload import Format, is_carried
from .comm.schema import schema_of
from .comm.state import State

_SHAPES = [(), (1,), (0,), (3, 0), (7,), (5, 3), (2, 3, 1, 3), (1031,)]
_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
_DAMAGES = 40


def check_codec(codec: Codec) -> None:
    """See whether a codec does what :class:`~fedpara_peft.Codec` says of it.

    Over odd shapes (scalars, nothing at all), floating-point dtypes, zeros and outliers: what it
    sends has the schema and the length foretold; what comes back has the tensor's own schema, lies
    within :meth:`~fedpara_peft.Codec.error`, and is the tensor itself if the codec is lossless;
    nothing is left of NaN or infinity, for those are refused; randomness comes from the generator
    alone; tensors are not changed; damaged bytes raise :class:`~fedpara_peft.PayloadError` and
    nothing else; its text is its own.

    Args:
        codec: one of your own, or any.

    Raises:
        CodecError: it breaks a promise; the message says which, and with what tensor.
    """
    _check_text(codec)
    for tensor in _tensors():
        _check_round_trip(codec, tensor)
    for value in (torch.nan, torch.inf, -torch.inf):
        for numel in (1, 7, 1031):
            _check_refused(codec, value, numel)
    _check_damaged(codec)


def _tensors() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for dtype in _DTYPES:
        for shape in _SHAPES:
            yield torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for scale in (1e-3, 1e3):
            yield (scale * torch.randn(64, generator=generator, dtype=torch.float64)).to(dtype)
        yield torch.zeros(9, dtype=dtype)
        yield torch.full((9,), -0.375, dtype=dtype)
        outlier = torch.full((301,), 1e-3, dtype=dtype)
        outlier[17] = -100
        yield outlier


def _check_round_trip(codec: Codec, tensor: Tensor) -> None:
    shown = f"a tensor of {tuple(tensor.shape)}, {tensor.dtype}"
    state: State = {"0": tensor}
    schema = schema_of(state)
    foretold = codec.wire_schema(schema)
    for name, entry in foretold.items():
        _require(codec, name == "0" or name.startswith("0."), f"wire({shown}) names {name!r}: all "
                 "names are the tensor's own, or begin with it and a dot")  # fmt: skip
        _require(codec, is_carried(entry.dtype), f"wire({shown}) has {entry.dtype}, which no "
                 "payload carries")  # fmt: skip
    kept = tensor.clone()
    before = torch.random.get_rng_state()
    sent = codec.encode_state(state, _seeded())
    _require(codec, schema_of(sent) == foretold, f"encode({shown}) makes {schema_of(sent)}, but "
             f"wire foretells {foretold}")  # fmt: skip
    form = Format(schema, codec)
    payload = form.encode(state, 3, _seeded())
    _require(codec, len(payload) == len(form.size), f"{shown} travels as {len(payload)} bytes, "
             f"foretold are {len(form.size)}")  # fmt: skip
    torch.rand(3)  # another state of torch's own generator
    between = torch.random.get_rng_state()
    again = form.encode(state, 3, _seeded())
    drawn = not torch.equal(torch.random.get_rng_state(), between)
    torch.random.set_rng_state(before)
    _require(codec, again.data == payload.data, f"{shown} is sent as other bytes by an equal "
             "generator: draw from the generator alone")  # fmt: skip
    _require(codec, not drawn, f"encode({shown}) moves torch's own generator: draw from the one "
             "that is given")  # fmt: skip
    _require(codec, _equal(tensor, kept), f"encode changes {shown} in place")
    back = form.decode(payload.data, 3)
    _require(codec, schema_of(back) == schema, f"{shown} comes back as {schema_of(back)['0']}")
    if codec.lossless:
        _require(codec, _equal(back["0"], tensor), f"it says lossless, but {shown} comes back "
                 "changed")  # fmt: skip
    exact, found = tensor.double(), back["0"].double()
    info = torch.finfo(tensor.dtype)
    rounding = info.eps * float(exact.norm()) + info.tiny * tensor.numel()
    stated = codec.error(tensor)
    lost = float((found - exact).norm())
    _require(codec, lost <= stated * (1 + 1e-5) + 2 * rounding, f"{shown} of norm "
             f"{float(exact.norm()):.4g} comes back with an error of {lost:.4g}, stated is "
             f"{stated:.4g}: see error()")  # fmt: skip


def _check_refused(codec: Codec, value: float, numel: int) -> None:
    for position in {0, numel // 2, numel - 1}:
        tensor = torch.randn(numel, generator=_seeded())
        tensor[position] = value
        form = Format(schema_of({"x": tensor}), codec)
        try:
            form.decode(form.encode({"x": tensor}, 0, _seeded()).data)
        except PayloadError:
            continue
        raise CodecError(
            f"codec {codec}: {value} among {numel} entries comes back as a number: let it stay "
            "what it is in something that travels, or raise PayloadError"
        )


def _check_damaged(codec: Codec) -> None:
    generator = _seeded()
    state = {"x": torch.randn(300, generator=generator), "y": torch.randn(7, generator=generator)}
    form = Format(schema_of(state), codec)
    payload = form.encode(state, 0, _seeded())
    length = payload.size.tensor_bytes
    if not length:
        return
    for _ in range(_DAMAGES):
        noise = torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8)
        data = bytearray(payload.data)
        data[-length:] = bytes(noise.tolist())
        try:
            back = form.decode(bytes(data))
        except PayloadError:
            continue
        except Exception as error:
            raise CodecError(
                f"codec {codec}: decoding damaged bytes raises {type(error).__name__}: {error}; "
                "raise PayloadError, so that one client is refused and not the run stopped"
            ) from error
        _require(codec, schema_of(back) == form.schema, "damaged bytes decode to other shapes")


def _check_text(codec: Codec) -> None:
    text = str(codec)
    _require(codec, bool(text) and text == str(codec), "its text is empty, or another each time")
    _require(codec, not re.search(r" at 0x[0-9a-f]+", text), "its text has an address: it is "
             "another in every process; write __str__ from its settings")  # fmt: skip
    try:
        named = codec_from_name(text)
    except CodecError:
        return
    _require(codec, type(named) is type(codec), f"its text is that of {type(named).__name__}: "
             "both ends of a run must be able to tell them apart")  # fmt: skip


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: also the sign of a zero."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _require(codec: Codec, holds: bool, message: str) -> None:
    if not holds:
        raise CodecError(f"codec {codec}: {message}")


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)
