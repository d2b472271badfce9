"""Payloads: bit-exact round trips, honest lengths, and a refusal for everything else."""

import csv
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from fedpara_peft import PayloadError
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.comm.payload import Format, is_finite
from fedpara_peft.comm.schema import schema_of

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SPECS = st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.tuples(SHAPES, DTYPES))


def make(specs):
    return {k: (torch.randn(s) * 100).to(d) for k, (s, d) in specs.items()}


def encode(state, round=0):
    return Format(schema_of(state)).encode(state, round)


def decode(data, schema, round=0):
    return Format(schema).decode(data, round)


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
    assert len(payload) == len(payload.data) == len(payload.size)
    if state:
        assert payload.size == Format(schema_of(state)).size  # known before anything is encoded


def test_views_and_transposes_survive():
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.T, "v": base[:, 1:3]}
    back = decode(encode(state).data, schema_of(state))
    assert torch.equal(back["t"], base.T)
    assert torch.equal(back["v"], base[:, 1:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex64])
def test_large_values_are_finite_though_their_norm_is_not(dtype):
    large = torch.full((50,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(large)
    assert torch.equal(decode(encode({"x": large}).data, schema_of({"x": large}))["x"], large)
    for bad in (float("nan"), float("inf"), -float("inf")):
        large[7] = bad
        assert not is_finite(large)
    assert is_finite(torch.zeros(0, dtype=dtype))


STATE = {"a": torch.randn(3, 2), "b": torch.tensor(7)}


def forged(header, body=b"\0" * 32):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + body


SCHEMA = schema_of(STATE)
ENTRY_A = {"dtype": "F32", "shape": [3, 2], "data_offsets": [8, 32]}
ENTRY_B = {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}
META = Format(SCHEMA)._metadata(0)


def header(**changes):
    return {"__metadata__": META, "0": ENTRY_A, "1": ENTRY_B, **changes}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "length"),
        (b"\x01", "length"),
        (encode(STATE).data[:-1], "length"),
        (encode(STATE).data + b"\0", "length"),
        (encode(STATE).data + b"\0" * 10_000, "length"),
        (encode(STATE).data[:20], "length"),
        ((2**62).to_bytes(8, "little") + b"{}", "length"),
        (forged(b"not json"), "malformed"),
        (forged(b"[1, 2]"), "malformed"),
        (forged(b"[" * 1000), "malformed"),
        (forged(header(**{"0": 3})), "malformed"),
        (forged(header(**{"0": {**ENTRY_A, "shape": "x"}})), "malformed"),
        (forged(header(**{"0": {**ENTRY_A, "shape": [1e999, 2]}})), "malformed"),
        (forged(header(**{"0": {**ENTRY_A, "data_offsets": [0, 24]}})), "malformed"),
        (forged({"0": ENTRY_A, "1": ENTRY_B}), "codec"),
        (forged(header(__metadata__={**META, "codec": "int8"})), "codec"),
        (forged(header(__metadata__={**META, "schema": "0"})), "schema"),
        (encode({"b": torch.zeros(3, 2), "a": torch.tensor(7)}).data, "schema"),
        (encode(STATE, round=3).data, "stale"),
        (forged({"__metadata__": META, "0": ENTRY_A}), "keys"),
        (forged(header(c=ENTRY_B)), "keys"),
        (forged(header(**{"0": {**ENTRY_A, "shape": [10**12]}})), "shape"),
        (forged(header(**{"0": {**ENTRY_A, "dtype": "F64"}})), "dtype"),
        (encode({**STATE, "a": torch.full((3, 2), float("nan"))}).data, "not_finite"),
        (encode({**STATE, "a": torch.full((3, 2), float("inf"))}).data, "not_finite"),
    ],
)
def test_refusals_name_their_reason(data, reason):
    with pytest.raises(PayloadError, match="payload refused") as caught:
        decode(data, SCHEMA)
    assert caught.value.reason == reason


def test_refusals_show_the_names_that_the_receiver_knows():
    data = forged(header(**{"0": {**ENTRY_A, "shape": [2, 3]}}))
    with pytest.raises(PayloadError, match=r"a is \(2, 3\), agreed on \(3, 2\)"):
        decode(data, SCHEMA)
    with pytest.raises(PayloadError, match=r"round is '0000000003', here it is '0000000004'"):
        decode(encode(STATE, 3).data, SCHEMA, 4)


def test_anyone_can_read_a_payload():
    """It is a safetensors file: no pickle, tensors in the schema's order."""
    found = load(encode(STATE).data)
    assert torch.equal(found["0"], STATE["a"])
    assert torch.equal(found["1"], STATE["b"])


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


def test_ledger_exports_energy_and_time(tmp_path):
    ledger = Ledger()
    size = encode(STATE).size
    ledger.record(1, 0, "downlink", size)
    ledger.record(1, 3, "downlink", size)
    ledger.record(1, 3, "uplink", size)
    ledger.record(2, 0, "downlink", size)
    length = len(size)
    # The slowest client received and sent: two payloads at 2 megabits a second.
    assert ledger.round_s(1, 2.0, compute_s=5.0) == pytest.approx(5 + 2 * length * 8 / 2e6)
    assert ledger.round_s(3, 2.0) == 0
    assert ledger.energy_j(1e-6) == pytest.approx(4 * length * 8 * 1e-6)
    ledger.to_json_lines(tmp_path / "ledger.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert rows[2] == {
        "round": 1, "client": 3, "direction": "uplink",
        "header_bytes": size.header_bytes, "tensor_bytes": size.tensor_bytes,
    }  # fmt: skip
    ledger.to_csv(tmp_path / "ledger.csv")
    with open(tmp_path / "ledger.csv", newline="") as file:
        assert [{k: str(v) for k, v in row.items()} for row in rows] == list(csv.DictReader(file))
    ledger.save(tmp_path / "ledger.npy")
    assert list(Ledger.load(tmp_path / "ledger.npy").transfers()) == list(ledger.transfers())
