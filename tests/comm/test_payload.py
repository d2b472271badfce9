"""Payloads: bit-exact round trips, honest lengths, and a refusal for everything else."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpara_peft import PayloadError
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.comm.payload import decode, encode, schema_of

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SPECS = st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.tuples(SHAPES, DTYPES))


def make(specs):
    return {k: (torch.randn(s) * 100).to(d) for k, (s, d) in specs.items()}


@given(SPECS)
def test_round_trip_is_bit_exact(specs):
    state = make(specs)
    payload = encode(state)
    back = decode(payload.data, schema_of(state))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert payload.size.tensor_bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert (
        len(payload) == len(payload.data) == payload.size.header_bytes + payload.size.tensor_bytes
    )


def test_views_and_transposes_survive():
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.T, "v": base[:, 1:3]}
    back = decode(encode(state).data, schema_of(state))
    assert torch.equal(back["t"], base.T)
    assert torch.equal(back["v"], base[:, 1:3])


STATE = {"a": torch.randn(3, 2), "b": torch.tensor(7)}


def forged(header, body=b"\0" * 32):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + body


ENTRY_A = {"dtype": "F32", "shape": [3, 2], "data_offsets": [8, 32]}
ENTRY_B = {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "length"),
        (b"\x01", "length"),
        (encode(STATE).data[:-1], "length"),
        (encode(STATE).data + b"\0", "length"),
        (encode(STATE).data[:20], "length"),
        ((2**62).to_bytes(8, "little") + b"{}", "length"),
        (forged(b"not json"), "malformed"),
        (forged(b"[1, 2]"), "malformed"),
        (forged(b"[" * 100_000), "malformed"),
        (forged({"a": 3, "b": ENTRY_B}), "malformed"),
        (forged({"a": {**ENTRY_A, "shape": "x"}, "b": ENTRY_B}), "malformed"),
        (forged({"a": {**ENTRY_A, "data_offsets": [0, 24]}, "b": ENTRY_B}), "malformed"),
        (forged({"a": ENTRY_A}), "keys"),
        (forged({"a": ENTRY_A, "b": ENTRY_B, "c": ENTRY_B}), "keys"),
        (forged({"a": {**ENTRY_A, "shape": [10**12]}, "b": ENTRY_B}), "shape"),
        (forged({"a": {**ENTRY_A, "dtype": "F64"}, "b": ENTRY_B}), "dtype"),
        (encode({**STATE, "a": torch.full((3, 2), float("nan"))}).data, "not_finite"),
        (encode({**STATE, "a": torch.full((3, 2), float("inf"))}).data, "not_finite"),
    ],
)
def test_refusals_name_their_reason(data, reason):
    with pytest.raises(PayloadError, match="payload refused") as caught:
        decode(data, schema_of(STATE))
    assert caught.value.reason == reason


@given(st.binary(max_size=200), st.integers(0, 300))
def test_hostile_bytes_never_escape_the_typed_error(noise, cut):
    good = encode(STATE).data
    for data in (
        noise,
        good[:cut] + noise,
        noise + good,
        good[:8] + noise + good[8 + len(noise) :],
    ):
        try:
            back = decode(data, schema_of(STATE))
        except PayloadError:
            continue
        assert back.keys() == STATE.keys()


def test_ledger_adds_up_what_was_sent():
    ledger = Ledger()
    payload = encode(STATE)
    for number in range(2):
        for client in (1, 4):
            ledger.record(number, client, "downlink", payload.size)
            ledger.record(number, client, "uplink", payload.size)
    assert ledger.total_bytes() == 8 * len(payload.data)
    assert ledger.total_bytes(1) == 4 * len(payload.data)
    assert ledger.total_bytes(0, "uplink") == 2 * len(payload.data)
    assert ledger.header_bytes(0, "uplink") == 2 * payload.size.header_bytes
    assert next(ledger.transfers()).total_bytes == len(payload.data)
