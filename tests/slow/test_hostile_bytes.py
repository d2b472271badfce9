"""Hostile bytes, fed to the decoder: cut off, flipped, spliced, and headers that claim much."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.slow.hostile import ACCEPTED

EACH = 40_000
CODECS = ["identity", "int4", "topk:0.1+int8"]
CASES = [*(([codec], "payloads") for codec in CODECS), (CODECS, "headers")]


def apart(*given):
    """An attack in a fresh process: what this one has needed must not hide its memory."""
    command = [sys.executable, "-m", "tests.slow.hostile", json.dumps(given)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("codecs", "kind"), CASES, ids=[f"{kind} {'+'.join(names)}" for names, kind in CASES]
)
def test_hostile_bytes_are_refused_by_name_and_cost_no_memory(codecs, kind, rows):
    found, idle = (apart(codecs, kind, EACH, decode) for decode in (True, False))
    reasons = Counter(found["reasons"])
    assert reasons.total() == EACH
    # Of a payload whose values alone were changed nothing can be said.
    assert reasons[ACCEPTED] < EACH / 10
    assert kind == "payloads" or not reasons[ACCEPTED]
    by_decoding = found["peak_mb"] - idle["peak_mb"]
    assert by_decoding < 5
    rows.append(
        {
            "case": f"{EACH:,} hostile payloads, {codecs[0]}"
            if kind == "payloads"
            else f"{EACH:,} headers that claim terabytes, all codecs",
            "refused": {reason: n for reason, n in reasons.most_common() if reason != ACCEPTED},
            "accepted": reasons[ACCEPTED],
            "peak_mb": found["peak_mb"],
            "by_decoding_mb": by_decoding,
        }
    )


def text_of(rows):
    from report import table

    lines = [
        [
            row["case"],
            ", ".join(f"{n:,} × {reason}" for reason, n in row["refused"].items()),
            f"{row['accepted']:,}",
            f"{row['peak_mb']:.1f} MB, of them {row['by_decoding_mb']:.1f} by decoding",
        ]
        for row in rows
    ]
    return table(["case", "refused", ACCEPTED, "peak memory"], lines) + (
        "\n\nPeak memory: resident, of a fresh process, and what it is above one that makes the "
        "same bytes and decodes none."
    )


TABLE = ("hostile_bytes", "Hostile bytes", text_of)
