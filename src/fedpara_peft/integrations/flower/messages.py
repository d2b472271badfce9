"""Flower messages: jobs, answers and introductions as records, nothing pickled.

A payload travels as one array of bytes, which Flower sends in chunks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from ..engine.answers import UNREADABLE, as_bytes, count, malformed, positive, steps
from ..engine.jobs import Answer, Job

#: Bytes in a record, not a NumPy file: nothing but a payload's own checks ever parses them.
_STYPE = "safetensors"


def job_record(job: Job) -> RecordDict:
    """A job as records."""
    facts = asdict(job) | {"needed": list(job.needed), "missed": list(job.missed)}
    payload = facts.pop("payload")
    secure = {name: facts.pop(name) for name in ("wants", "cohort", "message")}
    for name in ("missed", "clip_norm"):  # not of every run; and a record has no None
        if not facts[name]:
            del facts[name]
    records = {"job": ConfigRecord(facts)}
    if job.wants:
        records["secure"] = ConfigRecord(secure | {"cohort": list(job.cohort)})
    return _with_payload(payload, records)


def read_job(content: RecordDict) -> Job:
    """The inverse of :func:`job_record`.

    Raises:
        PayloadError: it is not a job.
    """
    try:
        facts = content["job"]
        secure = content.get("secure", {})
        return Job(
            run=str(facts["run"]),
            round=count(facts["round"]),
            kept=count(facts["kept"]),
            needed=tuple(map(count, facts["needed"])),
            payload=_payload(content),
            missed=tuple(map(count, facts.get("missed", []))),
            clip_norm=positive(facts.get("clip_norm")),
            wants=str(secure.get("wants", "")),
            cohort=tuple(map(count, secure.get("cohort", []))),
            message=as_bytes(secure.get("message", b"")),
        )
    except UNREADABLE as error:
        raise malformed("job", error) from None


def answer_record(answer: Answer) -> RecordDict:
    """An answer as records."""
    facts = {"round": answer.round, "reason": answer.reason, "message": answer.message}
    metrics: dict[str, Any] = {
        "num_examples": answer.num_examples, "train_loss": answer.train_loss
    }  # fmt: skip
    if answer.terms is not None:
        metrics["terms"] = answer.terms
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
            round=count(facts["round"]),
            num_examples=count(metrics["num_examples"]),
            train_loss=float(metrics["train_loss"]),
            payload=_payload(content),
            steps=steps(metrics.get("steps", [])),
            terms=positive(metrics.get("terms")),
            reason=str(facts["reason"]),
            message=str(facts["message"]),
        )
    except UNREADABLE as error:
        raise malformed("answer", error) from None


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
        return count(record["client"]), count(record["num_examples"]), facts
    except UNREADABLE as error:
        raise malformed("introduction", error) from None


def _with_payload(payload: bytes, records: dict[str, Any]) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)
    return RecordDict({**records, "payload": ArrayRecord({"data": array})})


def _payload(content: RecordDict) -> bytes:
    return as_bytes(content["payload"]["data"].data)
