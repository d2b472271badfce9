"""Secure aggregation: the sum and nothing else; against known answers and Python's integers."""

import hashlib
import hmac
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.comm.secure_rounds import (
    NO_KEYS,
    NO_SHARES,
    NO_UNMASKING,
    NO_VECTOR,
    STAYS,
    Round,
    agreement,
    attack,
    attack_machines,
)

from fedpara_peft import PayloadError, SecureAggregationError
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.comm.secure import primitives
from fedpara_peft.comm.secure.agreement import Agreement
from fedpara_peft.comm.secure.messages import HEADER_BYTES, Kind, encoded, join_bits, lengths
from fedpara_peft.comm.secure.packing import Ring
from fedpara_peft.comm.secure.quantize import FixedRange
from fedpara_peft.comm.secure.shamir import PRIME, reconstruct, share

# The field and its shares.


def test_the_fields_prime_is_one():
    """Miller-Rabin, forty bases."""
    d, s = PRIME - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for base in range(2, 42):
        x = pow(base, d, PRIME)
        squares = [x, *(x := x * x % PRIME for _ in range(s - 1))]
        assert squares[0] == 1 or PRIME - 1 in squares


def test_shares_are_the_textbooks():
    """f(x) = 1234 + 166 x + 94 x², the example that most texts give."""
    drawn = iter([166, 94])
    found = share(
        (1234).to_bytes(32, "big"), 3, range(1, 7), lambda n: next(drawn).to_bytes(n, "big")
    )
    assert found == [1494, 1942, 2578, 3402, 4414, 5614]
    assert reconstruct({2: 1942, 4: 3402, 5: 4414}, 3) == (1234).to_bytes(32, "big")


@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.integers(1, 9), st.randoms())
def test_any_t_shares_give_the_secret_and_fewer_fit_every_secret(secret, t, more, random):
    n = t + more - 1
    points = random.sample(range(1, 200), n)
    shares = dict(zip(points, share(secret, t, points, random.randbytes), strict=True))
    chosen = random.sample(points, t)
    assert reconstruct({x: shares[x] for x in chosen}, t) == secret
    if t > 1:
        few = {x: shares[x] for x in chosen[:-1]}
        with pytest.raises(SecureAggregationError, match="nothing is revealed"):
            reconstruct(few, t)
        # For any other secret there is a last share that fits: so these say nothing of it.
        other = random.randbytes(32)
        last = _through({0: int.from_bytes(other, "big"), **few}, chosen[-1])
        assert reconstruct({**few, chosen[-1]: last}, t) == other


def _through(points, at):
    """Lagrange's polynomial, term by term."""
    total = 0
    for i, y in points.items():
        term = y
        for j in points.keys() - {i}:
            term = term * (at - j) * pow(i - j, PRIME - 2, PRIME) % PRIME
        total += term
    return total % PRIME


@pytest.mark.parametrize(
    ("secret", "t", "points"), [(31, 2, [1, 2]), (32, 3, [1, 2]), (32, 2, [0, 1]), (32, 2, [1, 1])]
)
def test_impossible_shares_are_refused(secret, t, points):
    with pytest.raises(SecureAggregationError):
        share(bytes(secret), t, points, bytes)


# The cryptography, against its standards.


def test_the_mask_stream_is_rfc_8439s():
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    expected = bytes.fromhex(
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
        "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
        "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )
    nonce = bytes.fromhex("000000000000004a00000000")
    found = primitives.stream(bytes(range(32)), len(text), nonce, counter=1)
    assert bytes(a ^ b for a, b in zip(found, text, strict=True)) == expected
    # Section 2.3.2, and appendix A.1: the first blocks.
    nonce = bytes.fromhex("000000090000004a00000000")
    block = primitives.stream(bytes(range(32)), 64, nonce, counter=1)
    assert block.hex().startswith(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    )
    zero = primitives.stream(bytes(32), 64)
    assert zero.hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")


def test_a_mask_is_the_streams_words():
    ring, key = Ring(21, 40), bytes(range(32))
    raw = primitives.stream(key, 64 * 3 + 4 * 40)[64 * 3 :]
    words = [int.from_bytes(raw[4 * i : 4 * i + 4], "little") % 2**21 for i in range(40)]
    assert ring.mask(key, skip=3).tolist() == words


def test_both_ends_agree_on_a_key_by_rfc_7748_and_rfc_5869():
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alices, bobs = primitives.public_key(alice), primitives.public_key(bob)
    assert alices.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bobs.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    secret = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    expanded = hmac.new(extracted, b"mask\x01", hashlib.sha256).digest()
    assert primitives.agreed_key(alice, bobs, b"mask") == expanded
    assert primitives.agreed_key(bob, alices, b"mask") == expanded
    assert primitives.agreed_key(bob, alices, b"shares") != expanded


def test_points_of_low_order_are_no_keys():
    with pytest.raises(PayloadError, match="low order"):
        primitives.agreed_key(bytes(range(32)), bytes(32), b"mask")


def test_what_is_sealed_opens_for_its_receiver_alone():
    key = bytes(range(32))
    sealed = primitives.seal(key, 3, b"shares", b"3|5")
    assert primitives.unseal(key, 3, sealed, b"3|5") == b"shares"
    for args in (
        (key, 5, sealed, b"3|5"),
        (key, 3, sealed, b"5|3"),
        (bytes(32), 3, sealed, b"3|5"),
    ):
        with pytest.raises(PayloadError, match="seal is broken"):
            primitives.unseal(*args)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    primitives._library.cache_clear()
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    try:
        with pytest.raises(SecureAggregationError, match=r"pip install 'fedpara-peft\[secure\]'"):
            primitives.require_library()
    finally:
        primitives._library.cache_clear()


# Integers, and their bits.


@given(st.integers(1, 64), st.integers(0, 200), st.integers(0, 2**32))
def test_packed_values_are_exactly_their_bits(bits, numel, seed):
    ring = Ring(bits, numel)
    rng = np.random.default_rng(seed)
    words = ring.reduced(np.frombuffer(rng.bytes(numel * ring.dtype.itemsize), ring.dtype))
    data = ring.pack(words)
    assert len(data) == math.ceil(bits * numel / 8)
    written = sum(int(word) << (bits * i) for i, word in enumerate(words))
    assert int.from_bytes(data, "little") == written
    assert np.array_equal(ring.unpack(data), words)


def test_long_vectors_are_packed_in_parts():
    ring = Ring(21, 2**16 + 12345)
    words = ring.mask(bytes(range(32)))
    data = ring.pack(words)
    assert len(data) == ring.num_bytes
    assert np.array_equal(ring.unpack(data), words)
    assert int.from_bytes(data, "little") >> 21 * 70_000 & 0x1FFFFF == int(words[70_000])


@given(st.integers(1, 2**62))
def test_the_modulus_is_the_smallest_that_tells_all_sums_apart(largest):
    ring = Ring.of_sums(largest, 2)
    assert 2**ring.bits >= 2 * largest + 1 > 2 ** (ring.bits - 1)
    ends = np.array([-largest, largest])
    assert ring.integers(ring.words(ends)).tolist() == ends.tolist()


def test_rounding_is_unbiased_within_one_level_and_clamps():
    how = FixedRange(0.5, 8)
    x = torch.full((100_000,), 0.3 * 0.5 / 127)
    q, clamped = how.integers({"w": x}, ["w"], torch.Generator().manual_seed(0))
    assert set(q.tolist()) == {0, 1}
    assert clamped == 0
    assert abs(q.mean() - 0.3) < 5 * math.sqrt(0.21 / len(q))
    x = torch.tensor([[-7.0, -0.5, 0.0], [0.2, 0.5, 9.0]])
    q, clamped = how.integers({"w": x}, ["w"], torch.Generator().manual_seed(1))
    assert clamped == 2
    assert q[[0, 1, 2, 4, 5]].tolist() == [-127, -127, 0, 127, 127]
    back = how.state(q, schema_of({"w": x}))["w"]
    assert back.shape == x.shape
    assert (back - x.clamp(-0.5, 0.5)).abs().max() < 0.5 / 127


# A round.


@given(st.data())
def test_the_masked_sum_is_the_sum_whoever_drops_out(data):
    n = data.draw(st.integers(2, 9))
    t = data.draw(st.integers(max(2, n // 2 + 1), n))
    agreed = agreement(
        n,
        t,
        numel=data.draw(st.integers(0, 40)),
        levels=data.draw(st.sampled_from([127, 2**15 - 1, 2**31 - 1])),
        largest_weight=data.draw(st.sampled_from([1, 5, 2**15])),
    )
    stay = st.sampled_from(
        [NO_KEYS, NO_SHARES, NO_VECTOR, NO_UNMASKING, STAYS, STAYS, STAYS, STAYS]
    )
    played = Round(agreed, {c: data.draw(stay) for c in agreed.clients}, data.draw(st.integers(0)))
    if len(played.reached(NO_UNMASKING)) < t:
        with pytest.raises(SecureAggregationError, match=f"the threshold is {t}"):
            played.play()
        return
    found, (values, weight, loss) = played.play(), played.expected()
    assert found.values.tolist() == values
    assert (found.weight, found.clients) == (weight, tuple(played.reached(NO_VECTOR)))
    assert found.train_loss == pytest.approx(loss, abs=2**-15)


def test_thirty_of_a_hundred_may_go_after_masking():
    agreed = agreement(100, 70, numel=50, levels=2**15 - 1)
    gone = dict.fromkeys(agreed.clients[::3][:30], NO_UNMASKING)
    played = Round(agreed, {**dict.fromkeys(agreed.clients, STAYS), **gone})
    found = played.play()
    assert found.values.tolist() == played.expected()[0]
    assert len(found.clients) == 100


def test_every_length_is_known_beforehand():
    agreed = agreement(6, 4, numel=33)
    played = Round(agreed)
    played.play()
    size = lengths(agreed)
    assert all(len(data) == size[kind] for (kind, _), data in played.seen.items())
    assert {len(data) for data in played.told[Kind.ALL_SHARES].values()} == {size[Kind.ALL_SHARES]}
    for kind in (Kind.ALL_KEYS, Kind.SURVIVORS):
        assert len(played.told[kind]) == size[kind]


def test_below_the_threshold_the_servers_view_shows_nothing():
    """Nine clients, six needed, five help: what the server holds is short of every secret."""
    agreed = agreement(9, 6, numel=64, levels=2**15 - 1)
    stages = dict(
        zip(agreed.clients, [STAYS] * 5 + [NO_UNMASKING] * 2 + [NO_VECTOR] * 2, strict=True)
    )
    played = Round(agreed, stages)
    with pytest.raises(SecureAggregationError, match=r"helped to unmask.*nothing.*is revealed"):
        played.play()
    _require_hidden(played)
    held = played.server._unmasking
    for client in agreed.clients:
        of_it = {agreed.points[h]: shares[client] for h, shares in held.items()}
        assert len(of_it) == 5
        with pytest.raises(SecureAggregationError):
            reconstruct(of_it, 6)
        assert reconstruct(of_it, 5) not in (
            played.clients[client]._own_seed, played.clients[client]._masking_key
        )  # fmt: skip


def test_nobody_gives_both_shares_of_a_client():
    agreed = agreement(6, 4)
    stages = {**dict.fromkeys(agreed.clients, STAYS), agreed.clients[2]: NO_VECTOR}
    played = Round(agreed, stages)
    played.play()
    for helper, own in played.shares.items():
        sent = played.seen[Kind.UNMASKING, helper]
        for client, (of_mask, of_key) in own.items():
            had = [s.to_bytes(33, "big") in sent for s in (of_mask, of_key)]
            assert had == ([True, False] if stages[client] == STAYS else [False, True])


def _require_hidden(played):
    """In all that passed no vector, as words of any width or packed, and no secret."""
    agreed = played.agreed
    passed = b"|".join(
        [
            *played.seen.values(), played.told[Kind.ALL_KEYS],
            *played.told[Kind.ALL_SHARES].values(),
        ]
    )  # fmt: skip
    for client, (values, weight, loss) in played.vectors.items():
        plain = agreed.vector(values, weight, loss).pack()
        assert plain not in passed
        assert plain[: agreed.values.num_bytes] not in passed
        for dtype in ("<i1", "<i2", "<i4", "<i8", "<f4", "<f8"):
            some = values.astype(dtype).tobytes()
            assert all(some[i : i + 16] not in passed for i in range(0, len(some) - 16, 16))
        if client in played.reached(NO_VECTOR):
            sent = agreed.unpack(played.seen[Kind.MASKED, client][HEADER_BYTES:])
            right = agreed.values.integers(sent.values) == values * weight
            assert right.mean() < 0.1
    for client in played.clients.values():
        for secret in (client._own_seed, client._masking_key, client._sealing_key):
            assert not secret or secret not in passed


def test_a_rounds_traffic_has_no_update():
    played = Round(agreement(8, 5, numel=64, levels=2**15 - 1))
    played.play()
    _require_hidden(played)


def test_masks_are_of_one_round():
    """The same vectors twice: nothing of what is sent is the same."""
    one, two = Round(agreement(numel=200), seed=1), Round(agreement(numel=200), seed=1)
    for c in two.agreed.clients:
        two.clients[c] = type(two.clients[c])(two.agreed, c)  # keys of its own, not the seed's
    assert one.play().values.tolist() == two.play().values.tolist()
    for c in one.agreed.clients:
        a, b = (r.seen[Kind.MASKED, c][HEADER_BYTES:] for r in (one, two))
        assert a != b


# A server that does not follow it.


@pytest.fixture
def masked():
    played = Round(agreement(6, 4))
    played.until_unmasking()
    return played


def test_a_server_that_asks_for_key_and_mask_of_one_client_is_refused(masked):
    agreed = masked.agreed
    client = masked.clients[agreed.clients[0]]
    all_came = masked.told[Kind.SURVIVORS]
    client.unmask(all_came)
    without_one = encoded(agreed, Kind.SURVIVORS, None, join_bits(agreed, agreed.clients[:-1]))
    for second in (without_one, all_came):
        with pytest.raises(SecureAggregationError, match=r"a second time.*answers once"):
            client.unmask(second)


def test_a_server_that_names_too_few_survivors_is_refused(masked):
    agreed = masked.agreed
    few = encoded(agreed, Kind.SURVIVORS, None, join_bits(agreed, agreed.clients[:3]))
    with pytest.raises(SecureAggregationError, match="3 clients sent vectors, the threshold is 4"):
        masked.clients[agreed.clients[0]].unmask(few)
    without = encoded(agreed, Kind.SURVIVORS, None, join_bits(agreed, agreed.clients[1:]))
    with pytest.raises(PayloadError, match="said not to have come"):
        masked.clients[agreed.clients[0]].unmask(without)


def test_a_client_masks_once_and_in_order(masked):
    agreed = masked.agreed
    c = agreed.clients[0]
    shares = masked.told[Kind.ALL_SHARES][c]
    with pytest.raises(SecureAggregationError, match="answered once, and in order"):
        masked.clients[c].mask(shares, *masked.vectors[c])
    with pytest.raises(SecureAggregationError, match="answered once, and in order"):
        masked.clients[c].share(masked.told[Kind.ALL_KEYS])


def test_a_threshold_of_half_the_cohort_is_none():
    for n, t in ((6, 3), (2, 1), (5, 6), (4, 0)):
        with pytest.raises(SecureAggregationError, match="hides nothing"):
            Agreement(0, tuple(range(n)), t, 1, 1)


def test_a_wrong_share_is_found_out(masked):
    agreed, server = masked.agreed, masked.server
    for c in agreed.clients:
        data = bytearray(masked.clients[c].unmask(masked.told[Kind.SURVIVORS]))
        if c == agreed.clients[1]:
            data[-1] ^= 1
        server.unmasking(c, bytes(data))
    with pytest.raises(SecureAggregationError, match=r"give another secret|of no secret"):
        server.total()


def test_a_vector_beyond_the_range_is_not_sent(masked):
    agreed = masked.agreed
    for values, weight in ([128] * 7, 1), ([1] * 6, 1), ([1] * 7, 2), ([1] * 7, 0):
        with pytest.raises(SecureAggregationError, match="cannot be summed"):
            agreed.vector(np.array(values), weight, 0.0)


def test_the_server_takes_a_message_once_and_in_its_time(masked):
    c, server = masked.agreed.clients[0], masked.server
    with pytest.raises(PayloadError, match="too late or early") as found:
        server.masked(c, masked.seen[Kind.MASKED, c])
    assert found.value.reason == "stale"
    fresh = Round(masked.agreed)
    keys = fresh.clients[c].advertise()
    fresh.server.keys(c, keys)
    with pytest.raises(PayloadError, match="twice"):
        fresh.server.keys(c, keys)
    with pytest.raises(PayloadError, match=r"another client's keys|is of client"):
        fresh.server.keys(masked.agreed.clients[1], keys)
    with pytest.raises(PayloadError, match="was not asked"):
        fresh.server.keys(99, keys)


def test_damaged_messages_are_refused_by_name():
    found = attack(4000)
    assert sum(found.values()) == 4000
    assert {"length", "malformed", "stale", "schema", "not_sampled"} <= found.keys()


def test_damaged_messages_stop_no_round():
    found = attack_machines(60)
    assert sum(found.values()) == 60
    assert {outcome for _, outcome in found} <= {"right", "wrong", "stopped"}
