"""What travels between the controller and the executors: jobs, answers, introductions.

A ``Shareable`` holds plain values and the payload's bytes; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nvflare.apis.shareable import Shareable

from ..engine.answers import UNREADABLE, as_bytes, count, malformed, positive, steps
from ..engine.jobs import Answer, Introduction, Job

#: Names of the tasks.
INTRODUCE, TRAIN = "fedpara_introduce", "fedpara_train"


def job_message(job: Job) -> Shareable:
    """A job as a message."""
    lists = {name: list(getattr(job, name)) for name in ("needed", "missed", "cohort")}
    return Shareable(asdict(job) | lists)


def read_job(message: Mapping[str, Any]) -> Job:
    """The inverse of :func:`job_message`.

    Raises:
        PayloadError: it is not a job.
    """
    try:
        return Job(
            run=str(message["run"]),
            round=count(message["round"]),
            kept=count(message["kept"]),
            needed=tuple(map(count, message["needed"])),
            payload=as_bytes(message["payload"]),
            missed=tuple(map(count, message["missed"])),
            clip_norm=positive(message["clip_norm"]),
            wants=str(message["wants"]),
            cohort=tuple(map(count, message["cohort"])),
            message=as_bytes(message["message"]),
        )
    except UNREADABLE as error:
        raise malformed("job", error) from None


def answer_message(answer: Answer) -> Shareable:
    """An answer as a message."""
    return Shareable(asdict(answer) | {"steps": list(answer.steps)})


def read_answer(message: Mapping[str, Any]) -> Answer:
    """The inverse of :func:`answer_message`.

    Raises:
        PayloadError: it is not an answer.
    """
    try:
        return Answer(
            round=count(message["round"]),
            num_examples=count(message["num_examples"]),
            train_loss=float(message["train_loss"]),
            payload=as_bytes(message["payload"]),
            steps=steps(message["steps"]),
            terms=positive(message["terms"]),
            reason=str(message["reason"]),
            message=str(message["message"]),
        )
    except UNREADABLE as error:
        raise malformed("answer", error) from None


def introduction_message(own: Introduction) -> Shareable:
    """How many examples a site's client has, and what its app was given."""
    facts = json.dumps(dict(own.facts), sort_keys=True)
    return Shareable({"num_examples": own.num_examples, "facts": facts})


def read_introduction(message: Mapping[str, Any]) -> Introduction:
    """The inverse of :func:`introduction_message`.

    Raises:
        PayloadError: it is not an introduction.
    """
    try:
        facts = json.loads(str(message["facts"]))
        if not isinstance(facts, dict):
            raise TypeError("facts are no object")
        found = Introduction(count(message["num_examples"]), facts)
        if not found.num_examples:
            raise ValueError("it has no examples")
        return found
    except UNREADABLE as error:
        raise malformed("introduction", error) from None
