"""Payloads from somebody who means harm: ``python -m tests.slow.hostile JSON`` decodes many."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from tests.slow.faults import build

from fedpara_peft import PayloadError, communicated_state
from fedpara_peft.comm.codecs import codec_from_name
from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import schema_of

#: Ways of :func:`mutated`.
KINDS = {"payloads": (0, 1, 2, 3, 6), "headers": (4, 5)}
ACCEPTED = "accepted, finite and of the right shape"


def attack(names, kind, count, decode):
    """Make hostile payloads, decode them or not; reasons, and the process's peak memory."""
    rng = random.Random(0)
    state = {n: t.clone() for n, t in communicated_state(build()).items()}
    forms = [Format(schema_of(state), codec_from_name(name)) for name in names]
    good = [form.encode(state, 0, torch.Generator().manual_seed(0)).data for form in forms]
    for form, data in zip(forms, good, strict=True):
        form.decode(data)
    reasons = Counter()
    for i in range(count):
        form, data = forms[i % len(forms)], mutated(good[i % len(forms)], rng, KINDS[kind])
        if not decode:
            continue
        try:
            back = form.decode(data)
        except PayloadError as error:
            reasons[error.reason] += 1
        else:  # only values were changed: what a client might have trained
            assert all(bool(t.isfinite().all()) for t in back.values())
            assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in state.items()}
            reasons[ACCEPTED] += 1
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return {"reasons": reasons, "peak_mb": int(peak.split()[1]) / 1e3}


def mutated(good, rng, kinds):
    """A payload spoilt in one of several ways."""
    kind = rng.choice(kinds)
    length = int.from_bytes(good[:8], "little")
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:
        data = bytearray(good)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == 2:
        start = rng.randrange(len(good))
        return good[:start] + rng.randbytes(rng.randrange(1, 400)) + good[start:]
    if kind == 3:
        return rng.randbytes(rng.randrange(0, 2 * len(good)))
    if kind == 4:  # a length that claims terabytes
        return rng.randrange(2**40, 2**63).to_bytes(8, "little") + good[8:]
    header = json.loads(good[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    if kind == 5:  # a tensor that claims terabytes
        size = rng.randrange(2**38, 2**50)
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    else:  # something else than a tensor
        header[name] = rng.choice([None, [], -1, "x", {"dtype": {}}, {"shape": [[]]}, {"a": {}}])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(attack(*json.loads(sys.argv[1]))))
