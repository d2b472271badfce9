"""What secure aggregation costs in bytes, and that its sums are right to the bit.

    python benchmarks/secure_aggregation.py [--times]

Fifty rounds with 30 % of the cohort gone after they have sent masked updates: each sum is compared
with Python's integers. Bytes a client and round beside a plain round's for cohorts of 10, 50 and
100 and an adapter of LoRA's size: they follow from n, t, the values and their bits alone, and are
those of the messages of the fifty rounds. ``--times`` measures what a round costs the machines and
writes a table of its own; run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from report import table, write

from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import TensorSchema
from fedpara_peft.comm.secure.agreement import Agreement
from fedpara_peft.comm.secure.client import SecureClient
from fedpara_peft.comm.secure.messages import Kind, lengths
from fedpara_peft.comm.secure.server import SecureServer

ROUNDS, GONE = 50, 0.3
COHORTS, BITS = (10, 50, 100), (8, 16, 32)
#: Rank 8 on the query and value projections of 24 layers of width 1024, float32.
LAYERS, WIDTH, RANK = 24, 1024, 8
VALUES = LAYERS * 2 * 2 * WIDTH * RANK
#: Values of the fifty rounds: what is right of one value is right of all.
FEW = 1_000
DOWN = (Kind.ALL_KEYS, Kind.ALL_SHARES, Kind.SURVIVORS)


def agreement(round: int, n: int, numel: int, bits: int) -> Agreement:
    """Of a cohort that may lose three in ten."""
    threshold = n - int(GONE * n + 1e-9)
    return Agreement(round, tuple(range(n)), threshold, numel, 2 ** (bits - 1) - 1)


def played(agreed: Agreement, seed: int) -> dict[str, Any]:
    """A round: whether its sum is right, and what it took."""
    rng = np.random.default_rng(seed)
    n, size = len(agreed.clients), lengths(agreed)
    gone = set(rng.choice(n, size=n - agreed.threshold, replace=False).tolist())
    vectors = {
        c: rng.integers(-agreed.levels, agreed.levels, agreed.numel, endpoint=True)
        for c in agreed.clients
    }
    server = SecureServer(agreed)
    clients = {c: SecureClient(agreed, c) for c in agreed.clients}
    sent: dict[Kind, set[int]] = {kind: set() for kind in Kind}
    spent = {"clients": 0.0, "server": 0.0}

    def timed(who: str, act: Any, *given: Any) -> Any:
        start = time.perf_counter()
        found = act(*given)
        spent[who] += time.perf_counter() - start
        return found

    for c, client in clients.items():
        data = timed("clients", client.advertise)
        sent[Kind.KEYS].add(len(data))
        timed("server", server.keys, c, data)
    keys = timed("server", server.all_keys)
    sent[Kind.ALL_KEYS].add(len(keys))
    for c, client in clients.items():
        data = timed("clients", client.share, keys)
        sent[Kind.SHARES].add(len(data))
        timed("server", server.shares, c, data)
    shares = timed("server", server.all_shares)
    sent[Kind.ALL_SHARES].update(map(len, shares.values()))
    for c, client in clients.items():
        data = timed("clients", client.mask, shares[c], vectors[c], 1, 0.0)
        sent[Kind.MASKED].add(len(data))
        timed("server", server.masked, c, data)
    survivors = timed("server", server.survivors)
    sent[Kind.SURVIVORS].add(len(survivors))
    for c in sorted(set(clients) - gone):
        data = timed("clients", clients[c].unmask, survivors)
        sent[Kind.UNMASKING].add(len(data))
        timed("server", server.unmasking, c, data)
    found = timed("server", server.total)
    expected = [sum(column) for column in zip(*(v.tolist() for v in vectors.values()), strict=True)]
    return {
        "gone": len(gone),
        "right": found.values.tolist() == expected,
        "foretold": all(lengths_found == {size[kind]} for kind, lengths_found in sent.items()),
        "client_s": spent["clients"] / n,
        "server_s": spent["server"],
    }


def bytes_row(n: int, bits: int) -> dict[str, Any]:
    """Bytes of a client and round, beside the plain ones."""
    agreed = agreement(0, n, VALUES, bits)
    size = lengths(agreed)
    factors = {
        f"{layer}.{end}": TensorSchema((RANK, WIDTH), torch.float32)
        for layer in range(2 * LAYERS)
        for end in "AB"
    }
    down = sum(size[kind] for kind in DOWN)
    return {
        "n": n,
        "threshold": agreed.threshold,
        "bits": bits,
        "bits_a_value": agreed.values.bits,
        "plain_bytes": len(Format(factors).size),
        "masked_bytes": size[Kind.MASKED],
        "up_bytes": sum(size.values()) - down,
        "beside_down_bytes": down,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", action="store_true", help="measure time, in a table of its own")
    if parser.parse_args().times:
        times()
        return
    rounds = []
    for number in range(ROUNDS):
        large = number % 25 == 24  # one of 50 clients and one of 100 among many of 10
        n, bits = COHORTS[large + (number == ROUNDS - 1)], BITS[number % len(BITS)]
        rounds.append({"n": n, "bits": bits, **played(agreement(number, n, FEW, bits), number)})
    for row in rounds:
        del row["client_s"], row["server_s"]
    assert all(row["right"] and row["foretold"] for row in rounds), "a sum or a length is wrong"
    sizes = [bytes_row(n, bits) for n in COHORTS for bits in BITS]
    gone = sum(row["gone"] for row in rounds)
    lines = [
        [
            f"{s['n']}, {s['threshold']}",
            str(s["bits"]),
            str(s["bits_a_value"]),
            f"{s['up_bytes']:,}",
            f"{s['up_bytes'] / s['plain_bytes']:.3f}",
            f"{s['up_bytes'] - s['masked_bytes']:,}",
            f"{s['beside_down_bytes']:,}",
        ]
        for s in sizes
    ]
    header = [
        "n, t", "secure_bits", "bits a value", "up", "of plain", "of them keys and shares",
        "keys and shares down",
    ]  # fmt: skip
    first = (
        f"{ROUNDS} rounds with {GONE:.0%} of each cohort (10, once 50 and once 100 clients) gone "
        f"after masking, {gone} clients in all: every sum is that of Python's integers to the bit, "
        "and every message of the length foretold."
    )
    second = (
        f"Bytes a client and round, with {VALUES:,} values (rank {RANK} on two projections of "
        f"{LAYERS} layers of width {WIDTH}); a plain round's, in float32, are "
        f"{sizes[0]['plain_bytes']:,} up, and as many down in either. The last column comes down "
        "beside them."
    )
    text = f"{first}\n\n{second}\n\n{table(header, lines)}"
    write(
        "secure_aggregation",
        "Secure aggregation: sums and bytes",
        text,
        [*rounds, *sizes],
        command="python benchmarks/secure_aggregation.py",
    )


def times() -> None:
    """What a round of a sixteenth of the adapter costs, with three in ten gone after masking."""
    numel = VALUES // 16
    rows = [{"n": n, **played(agreement(0, n, numel, 16), n)} for n in COHORTS[:2]]
    lines = [[str(r["n"]), f"{r['client_s']:.2f}", f"{r['server_s']:.2f}"] for r in rows]
    text = f"{numel:,} values of 16 bits.\n\n" + table(["n", "s a client", "s the server"], lines)
    write("secure_aggregation_times", "Secure aggregation: time of a round", text, rows)


if __name__ == "__main__":
    main()
