"""A round of secure aggregation played out with machines alone, and its messages damaged."""

import numpy as np

from fedpara_peft.comm.errors import PayloadError, SecureAggregationError
from fedpara_peft.comm.secure.agreement import Agreement
from fedpara_peft.comm.secure.client import SecureClient
from fedpara_peft.comm.secure.messages import (
    COMMITMENT_BYTES,
    KEYS_BYTES,
    SEALED_BYTES,
    Kind,
    body_of,
    encoded,
    join_bits,
    join_entries,
    join_shares,
    require_length,
    split_bits,
    split_entries,
    split_shares,
)
from fedpara_peft.comm.secure.server import SecureServer
from fedpara_peft.comm.secure.shamir import SHARE_BYTES

#: How far a client comes.
NO_KEYS, NO_SHARES, NO_VECTOR, NO_UNMASKING, STAYS = range(5)


def agreement(n=5, threshold=None, numel=7, levels=127, largest_weight=1, round=3):
    clients = tuple(3 * i + 1 for i in range(n))  # neither from 0 nor without gaps
    return Agreement(round, clients, threshold or n // 2 + 1, numel, levels, largest_weight, b"x")


class Round:
    """All messages of a round, as they pass.

    Attributes:
        seen: what the server was sent, by kind and client.
        told: what it sent, likewise.
    """

    def __init__(self, agreed, stages=None, seed=0):
        self.agreed, self.stages = agreed, stages or dict.fromkeys(agreed.clients, STAYS)
        rng = np.random.default_rng(seed)
        self.entropy = rng.bytes
        self.vectors = {
            c: (
                rng.integers(-agreed.levels, agreed.levels, agreed.numel, endpoint=True),
                int(rng.integers(1, agreed.largest_weight, endpoint=True)),
                float(np.round(rng.normal() * 64) / 64),
            )
            for c in agreed.clients
        }
        self.clients = {c: SecureClient(agreed, c, self.entropy) for c in agreed.clients}
        self.server = SecureServer(agreed)
        self.seen, self.told, self.shares = {}, {}, {}

    def reached(self, stage):
        return [c for c in self.agreed.clients if self.stages[c] > stage]

    def up(self, kind, client, data):
        self.seen[kind, client] = data
        return data

    def play(self):
        """The sum, or what the server says instead."""
        self.until_unmasking()
        survivors = self.told[Kind.SURVIVORS]
        for c in self.reached(NO_UNMASKING):
            data = self.up(Kind.UNMASKING, c, self.clients[c].unmask(survivors))
            self.server.unmasking(c, data)
        return self.server.total()

    def until_unmasking(self):
        server, clients = self.server, self.clients
        for c in self.reached(NO_KEYS):
            server.keys(c, self.up(Kind.KEYS, c, clients[c].advertise()))
        keys = self.told[Kind.ALL_KEYS] = server.all_keys()
        for c in self.reached(NO_SHARES):
            server.shares(c, self.up(Kind.SHARES, c, clients[c].share(keys)))
        shares = self.told[Kind.ALL_SHARES] = server.all_shares()
        for c in self.reached(NO_VECTOR):
            data = self.up(Kind.MASKED, c, clients[c].mask(shares[c], *self.vectors[c]))
            server.masked(c, data)
            self.shares[c] = dict(clients[c]._shares)  # it forgets them
        self.told[Kind.SURVIVORS] = server.survivors()

    def expected(self):
        """What the sum must be, in Python's integers."""
        came = [self.vectors[c] for c in self.reached(NO_VECTOR)]
        values = [sum(w * int(x[i]) for x, w, _ in came) for i in range(self.agreed.numel)]
        weight = sum(w for _, w, _ in came)
        return values, weight, sum(w * loss for _, w, loss in came) / weight


def again(agreed, kind, client, data):
    """A message read, checked as its receiver checks it, and written again."""
    body = body_of(agreed, kind, client, data)
    if kind is Kind.KEYS:
        body = require_length(body, KEYS_BYTES)
    elif kind is Kind.ALL_KEYS:
        body = join_entries(split_entries(body, KEYS_BYTES, agreed.clients))
    elif kind in (Kind.SHARES, Kind.ALL_SHARES):
        skip = COMMITMENT_BYTES if kind is Kind.SHARES else 0
        peers = [c for c in agreed.clients if c != client]
        body = body[:skip] + join_entries(split_entries(body[skip:], SEALED_BYTES, peers))
    elif kind is Kind.MASKED:
        body = agreed.unpack(body).pack()
    elif kind is Kind.SURVIVORS:
        body = join_bits(agreed, split_bits(agreed, body))
    else:
        found = split_entries(body, SHARE_BYTES, agreed.clients)
        body = join_entries({c: join_shares(*split_shares(s, 1)) for c, s in found.items()})
    return encoded(agreed, kind, client, body)


def messages(played):
    """One of each kind: kind, whose, bytes."""
    first = played.agreed.clients[0]
    found = [
        (kind, first, played.seen[kind, first]) for kind in Kind if (kind, first) in played.seen
    ]
    found += [(kind, None, played.told[kind]) for kind in (Kind.ALL_KEYS, Kind.SURVIVORS)]
    return [*found, (Kind.ALL_SHARES, first, played.told[Kind.ALL_SHARES][first])]


def damaged(data, others, rng):
    """A message that something happened to."""
    found = bytearray(data)
    what = rng.integers(6)
    if what == 0:
        return bytes(found[: rng.integers(len(found))])
    if what == 1:
        return bytes(found) + rng.bytes(int(rng.integers(1, 80)))
    if what == 2:
        return rng.bytes(int(rng.integers(0, 2 * len(found))))
    if what == 3:
        other = others[rng.integers(len(others))]
        cut = int(rng.integers(len(found)))
        return bytes(found[:cut]) + other[cut:]
    if what == 4:  # keep the header, so that what follows is reached
        return bytes(found[:26]) + rng.bytes(len(found) - 26)
    for _ in range(rng.integers(1, 4)):
        found[rng.integers(len(found))] ^= 1 << int(rng.integers(8))
    return bytes(found)


def attack(count, seed=0):
    """How many damaged messages were accepted, and how many refused, by reason.

    Raises:
        AssertionError: one that was accepted breaks a rule: it is not, to the last bit, the message
            that its receiver takes it for.
    """
    rng = np.random.default_rng(seed)
    played = Round(agreement(n=6, numel=5, levels=2**15 - 1))
    played.play()
    agreed, all_of = played.agreed, messages(played)
    others, found = [data for _, _, data in all_of], {}
    for _ in range(count):
        kind, client, data = all_of[rng.integers(len(all_of))]
        hostile = damaged(data, others, rng)
        try:
            assert again(agreed, kind, client, hostile) == hostile, (kind, hostile.hex())
            reason = "accepted"
        except PayloadError as error:
            reason = error.reason
        found[reason] = found.get(reason, 0) + 1
    return found


def attack_machines(count, seed=0):
    """Damaged messages in the place of real ones, at every stage; the outcomes by name.

    A machine either refuses by a typed error or goes on; whoever goes on ends in the right sum, in
    a wrong one by vectors that were themselves damaged, or in a typed error.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(count):
        stage = list(Kind)[rng.integers(len(Kind))]
        try:
            outcome = _attacked(stage, int(rng.integers(5)), rng, i)
        except SecureAggregationError:
            outcome = "stopped"
        found[stage.name, outcome] = found.get((stage.name, outcome), 0) + 1
    return found


def _attacked(stage, victim, rng, seed):
    agreed = agreement(n=5, threshold=3, numel=3)
    played = Round(agreed, seed=seed)
    clients, server = played.clients, played.server
    target = agreed.clients[victim]
    hit = []

    def passes(kind, client, data):
        if kind is not stage or client != target:
            return data
        changed = damaged(data, [data], rng)
        if changed != data:
            hit.append(kind)
        return changed

    def tried(act, *given):
        try:
            return act(*given)
        except PayloadError:
            return None

    alive = list(agreed.clients)
    for c in alive:
        tried(server.keys, c, passes(Kind.KEYS, c, clients[c].advertise()))
    keys = server.all_keys()
    for c in alive:
        sent = tried(clients[c].share, passes(Kind.ALL_KEYS, c, keys))
        if sent is not None:
            tried(server.shares, c, passes(Kind.SHARES, c, sent))
    shares, came = server.all_shares(), []
    for c in shares:
        sent = tried(clients[c].mask, passes(Kind.ALL_SHARES, c, shares[c]), *played.vectors[c])
        if sent is not None:
            tried(server.masked, c, passes(Kind.MASKED, c, sent))
            came = list(server.came)
    survivors = server.survivors()
    for c in came:
        sent = tried(clients[c].unmask, passes(Kind.SURVIVORS, c, survivors))
        if sent is not None:
            tried(server.unmasking, c, passes(Kind.UNMASKING, c, sent))
    values = server.total().values.tolist()
    played.stages = {c: STAYS if c in came else NO_VECTOR for c in agreed.clients}
    right = values == played.expected()[0]
    assert right or stage is Kind.MASKED, (stage, hit)
    return "right" if right else "wrong"
