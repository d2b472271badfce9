"""Flower messages: jobs, answers and introductions as records, nothing pickled.

A payload travels as one array of bytes, which Flower sends in chunks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from ...comm.errors import PayloadError, Refusal
from .node import Answer, Job

#: Bytes in a record, not a NumPy file: nothing but a payload's own checks ever parses them.
_STYPE = "safetensors"


def job_record(job: Job) -> RecordDict:
    """A job as records."""
    facts = asdict(job) | {"needed": list(job.needed)}
    return _with_payload(facts.pop("payload"), {"job": ConfigRecord(facts)})


def read_job(content: RecordDict) -> Job:
    """The inverse of :func:`job_record`.

    Raises:
        PayloadError: it is not a job.
    """
    try:
        facts = content["job"]
        return Job(
            run=str(facts["run"]),
            round=_count(facts["round"]),
            kept=_count(facts["kept"]),
            needed=tuple(map(_count, facts["needed"])),
            payload=_payload(content),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed("job", error) from None


def answer_record(answer: Answer) -> RecordDict:
    """An answer as records."""
    facts = {"round": answer.round, "reason": answer.reason, "message": answer.message}
    metrics: dict[str, Any] = {
        "num_examples": answer.num_examples, "train_loss": answer.train_loss
    }  # fmt: skip
    if answer.steps:
        metrics["steps"] = [float(value) for value in answer.steps]
    return _with_payload(
        answer.payload, {"answer": ConfigRecord(facts), "metrics": MetricRecord(metrics)}
    )


def read_answer(content: RecordDict) -> Answer:
    """The inverse of :func:`answer_record`.

    Raises:
        PayloadError: it is not an answer.
    """
    try:
        facts, metrics = content["answer"], content["metrics"]
        return Answer(
            round=_count(facts["round"]),
            num_examples=_count(metrics["num_examples"]),
            train_loss=float(metrics["train_loss"]),
            payload=_payload(content),
            steps=_steps(metrics.get("steps", [])),
            reason=str(facts["reason"]),
            message=str(facts["message"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed("answer", error) from None


def introduction_record(client: int, num_examples: int, facts: Mapping[str, Any]) -> RecordDict:
    """Which client a node trains, on how many examples, and what its app was given."""
    text = json.dumps(facts, sort_keys=True)
    record = {"client": client, "num_examples": num_examples, "facts": text}
    return RecordDict({"introduction": ConfigRecord(record)})


def read_introduction(content: RecordDict) -> tuple[int, int, dict[str, Any]]:
    """The inverse of :func:`introduction_record`.

    Raises:
        PayloadError: it is not an introduction.
    """
    try:
        record = content["introduction"]
        facts = json.loads(str(record["facts"]))
        if not isinstance(facts, dict):
            raise TypeError("facts are no object")
        return _count(record["client"]), _count(record["num_examples"]), facts
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed("introduction", error) from None


def refusal(reason: str) -> Refusal:
    """A reason that came from elsewhere, if it is one."""
    return reason if reason in get_args(Refusal) else "malformed"  # type: ignore[return-value]


def _with_payload(payload: bytes, records: dict[str, Any]) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)
    return RecordDict({**records, "payload": ArrayRecord({"data": array})})


def _payload(content: RecordDict) -> bytes:
    data = content["payload"]["data"].data
    if not isinstance(data, bytes):
        raise TypeError("the payload is not bytes")
    return data


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def _steps(values: Any) -> tuple[float, ...]:
    """Count, learning rate and weight of a client's steps, as far as they may be used."""
    found = tuple(float(value) for value in values)
    if found and (len(found) not in (2, 3) or not all(math.isfinite(v) and v > 0 for v in found)):
        raise ValueError(f"{values!r:.80} are no steps")
    return found


def _malformed(what: str, error: Exception) -> PayloadError:
    found = f"{type(error).__name__} {error!s:.100}"
    return PayloadError("malformed", f"not an {what} ({found}): run one version on both ends")
