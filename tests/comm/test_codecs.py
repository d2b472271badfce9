"""Codec laws: what travels has the promised length, and comes back within the promised error."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpara_peft import CodecError, PayloadError
from fedpara_peft.comm.codecs import Chain, TopK, codec_from_name
from fedpara_peft.comm.feedback import encode_with_feedback
from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import schema_of

NAMES = [
    "identity", "float16", "bfloat16", "int8", "int4", "topk:0.1", "topk:0.01", "topk:1",
    "topk:0.1+int8", "topk:0.3+int4", "topk:0.2+float16", "bfloat16+int8",
]  # fmt: skip
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_payloads_have_the_length_that_the_schema_says(name, shapes, seed):
    torch.manual_seed(seed)
    state = {f"w{i}": torch.randn(s) * 10.0 ** (i - 2) for i, s in enumerate(shapes)}
    state["count"] = torch.tensor(5)
    form = Format(schema_of(state), codec_from_name(name))
    payload = form.encode(state, 7, generator(seed))
    assert payload.size == form.size
    back = form.decode(payload.data, 7)
    assert schema_of(back) == schema_of(state)
    assert torch.equal(back["count"], state["count"])
    again = form.encode(state, 7, generator(seed))
    assert again.size == payload.size
    if name == "identity":
        assert all(torch.equal(back[k], v) for k, v in state.items())


def lossy(name, x, seed=0):
    codec = codec_from_name(name)
    schema = schema_of({"x": x})
    return codec.decode_state(codec.encode_state({"x": x}, generator(seed)), schema)["x"]


VALUES = st.lists(
    st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3),
    min_size=1,
    max_size=40,
)


@given(VALUES, st.integers(0, 9))
def test_error_bounds(values, seed):
    x = torch.tensor(values)
    exact = x.double()
    c = exact.abs().max()
    for name, bound in (
        ("float16", exact.abs() * 2**-11),
        ("bfloat16", exact.abs() * 2**-8),
        ("int8", c / 127),
        ("int4", c / 7),
    ):
        error = (lossy(name, x, seed).double() - exact).abs()
        assert (error <= bound * (1 + 1e-5) + 1e-12).all(), name
    for fraction in (0.1, 0.5):
        kept = math.ceil(fraction * len(values))
        found = lossy(f"topk:{fraction}", x)
        assert (found.double() - exact).square().sum() <= (
            1 - kept / len(values)
        ) * exact.square().sum() * (1 + 1e-9)
        assert int((found != 0).sum()) <= kept
        assert ((found == 0) | (found == x)).all()


@given(VALUES, st.integers(0, 9), st.sampled_from([0.1, 0.5]))
def test_error_bounds_of_a_chain(values, seed, fraction):
    """Against float64: the largest entries are off by a step at most, the others stay at home."""
    x = torch.tensor(values)
    exact = x.double()
    kept = math.ceil(fraction * len(values))
    threshold = exact.abs().sort(descending=True).values[kept - 1]
    for name, levels in (("int8", 127), ("int4", 7)):
        found = lossy(f"topk:{fraction}+{name}", x, seed).double()
        error, step = (found - exact).abs(), exact.abs().max() / levels
        rounded = error <= step * (1 + 1e-5) + 1e-12
        # Of equal entries at the threshold, any may travel.
        assert (rounded | ((found == 0) & (exact.abs() <= threshold))).all()
        assert (found[exact.abs() < threshold] == 0).all()
        assert int((found != 0).sum()) <= kept
        lost = (1 - kept / len(values)) * exact.square().sum() + kept * step**2
        assert error.square().sum() <= lost * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantization_is_unbiased(name):
    torch.manual_seed(1)
    x = torch.randn(50, dtype=torch.float64)
    repeats = 4000
    mean = sum(lossy(name, x, seed) for seed in range(repeats)) / repeats
    step = float(x.abs().max()) / codec_from_name(name).levels
    # Stochastic rounding has variance of at most a quarter step squared: five standard errors.
    assert ((mean - x).abs() < 5 * 0.5 * step / math.sqrt(repeats)).all()


def test_the_largest_entries_are_those_that_travel():
    x = torch.tensor([0.1, -5.0, 0.0, 3.0, -0.2, 4.0, 0.3, -0.4, 0.5, 0.6])
    assert lossy("topk:0.3", x).tolist() == [0, -5, 0, 3, 0, 4, 0, 0, 0, 0]
    codec = codec_from_name("topk:0.3+int8")
    assert isinstance(codec, Chain)
    assert not codec.dense
    found = lossy("topk:0.3+int8", x)
    assert (found != 0).nonzero().flatten().tolist() == [1, 3, 5]


def test_entries_are_named_in_the_shorter_way():
    def tensor_bytes(fraction, n):
        schema = schema_of({"x": torch.zeros(n)})
        return Format(schema, codec_from_name(f"topk:{fraction}")).size.tensor_bytes

    assert tensor_bytes(0.01, 10_000) == 100 * 4 + 100 * 4  # an index each
    assert tensor_bytes(0.1, 10_000) == 1000 * 4 + 10_000 // 8  # a bit for every entry


@pytest.mark.parametrize("name", ["topk:0.1", "topk:0.01", "topk:0.2+int4", "int4"])
@settings(deadline=None)
@given(noise=st.binary(min_size=60, max_size=60))
def test_hostile_contents_are_refused_or_decode_to_something_finite(name, noise):
    torch.manual_seed(0)
    state = {"x": torch.randn(300), "y": torch.randn(7)}
    form = Format(schema_of(state), codec_from_name(name))
    data = bytearray(form.encode(state, 0, generator()).data)
    data[-len(noise) :] = noise
    try:
        back = form.decode(bytes(data))
    except PayloadError as error:
        reason = error.reason
    else:
        reason = None
        assert schema_of(back) == schema_of(state)
        assert all(t.isfinite().all() for t in back.values())
    assert reason in (None, "malformed", "not_finite")


def test_codes_and_indices_beyond_the_last_are_refused():
    state = {"x": torch.randn(64)}
    for name, part, value in (
        ("int8", "0", 255),
        ("topk:0.01", "0.i", -1),
        ("topk:0.01", "0.i", 64),
    ):
        form = Format(schema_of(state), codec_from_name(name))
        wire = form.codec.encode_state({"0": state["x"]}, generator())
        wire[part] = torch.full_like(wire[part], value)
        with pytest.raises(PayloadError) as caught:
            form.codec.decode_state(wire, form._positions)
        assert caught.value.reason == "malformed"


@pytest.mark.parametrize("name", ["int8", "int4", "topk:0.1", "topk:0.1+int4", "bfloat16"])
def test_error_feedback_keeps_exactly_what_was_lost(name):
    """Over many rounds all that was meant arrives, but for the last residual."""
    torch.manual_seed(0)
    form = Format(
        schema_of({"x": torch.zeros(200, dtype=torch.float64), "n": torch.tensor(0)}),
        codec_from_name(name),
    )
    meant = torch.zeros(200, dtype=torch.float64)
    arrived = torch.zeros_like(meant)
    residual = {}
    for number in range(30):
        x = torch.randn(200, dtype=torch.float64)
        before = residual.get("x", torch.zeros_like(x))
        payload, received, residual = encode_with_feedback(
            form, {"x": x, "n": torch.tensor(number)}, residual, number, generator(number)
        )
        assert torch.equal(residual["x"], x + before - received["x"])
        assert "n" not in residual
        assert torch.equal(received["x"], form.decode(payload.data, number)["x"])
        meant += x
        arrived += received["x"]
    torch.testing.assert_close(arrived + residual["x"], meant, atol=1e-9, rtol=0)
    assert residual["x"].norm() > 0


@given(st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_every_fraction_has_a_name_of_its_own(one, other):
    assert codec_from_name(str(TopK(one))) == TopK(one)
    assert (str(TopK(one)) == str(TopK(other))) == (one == other)
    assert [str(TopK(x)) for x in (1, 0.1, 1 / 3)] == [
        "topk:1", "topk:0.1", "topk:0.3333333333333333"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["float16", "float16+int8"])
def test_what_leaves_a_codecs_range_says_so(name):
    state = {"x": torch.tensor([1.0, 1e5])}
    form = Format(schema_of(state), codec_from_name(name))
    with pytest.raises(PayloadError, match=f"or it is beyond what {re.escape(name)} holds"):
        form.decode(form.encode(state).data)


@pytest.mark.parametrize("name", ["int7", "topk", "topk:0", "topk:1.5", "topk:x", "int8+", ""])
def test_unknown_codecs(name):
    with pytest.raises(CodecError, match="use identity, float16"):
        codec_from_name(name)
