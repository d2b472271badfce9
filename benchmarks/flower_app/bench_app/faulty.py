"""The digits app of examples/flower, with nodes that can be told to misbehave.

``--node-config 'fault="nan" fault-round=2'``: from that round on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from digits_app import task
from digits_app.task import data_fn, model_fn
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch.utils.data import Dataset, TensorDataset

from bench_app.digits import server_of
from fedpara_peft import FederatedArguments
from fedpara_peft.integrations.flower import client_app
from fedpara_peft.integrations.flower.messages import answer_record, read_answer


def arguments(run_config: Mapping[str, Any]) -> FederatedArguments:
    """The example's settings; every round is saved, so that all states can be compared."""
    return dataclasses.replace(task.arguments(run_config), save_every=1)


def sick_data(client: int) -> Dataset:
    """A client's examples, one pixel of which is no number."""
    rows = data_fn(client)
    inputs = torch.stack([x for x, _ in rows])
    inputs[0, 0] = float("nan")
    return TensorDataset(inputs, torch.stack([y for _, y in rows]))


lasting = client_app(model_fn, data_fn, arguments, worker=True)
plain = client_app(model_fn, data_fn, arguments)
sick = client_app(model_fn, sick_data, arguments)
server = server_of(arguments)


def client(context: Context) -> ClientApp:
    """The example's client, or one that spoils its answers."""
    fault = context.node_config.get("fault", "")
    whole = lasting if context.run_config["worker"] else plain
    if fault in ("", "sick"):
        return sick if fault else whole
    app = ClientApp()

    def train(message: Message, context: Context) -> Message:
        reply = whole(message, context)
        answer = read_answer(reply.content)
        kept = Path(str(context.node_config["state-dir"])) / "first-payload"
        if not kept.exists():
            kept.write_bytes(answer.payload)
        if answer.round + 1 >= int(context.node_config["fault-round"]):
            if fault == "nan":
                answer = dataclasses.replace(answer, payload=with_nan(answer.payload))
            else:
                answer = dataclasses.replace(answer, round=0, payload=kept.read_bytes())
        return Message(answer_record(answer), reply_to=message)

    app.query()(whole)
    app.train()(train)
    return app


def with_nan(payload: bytes) -> bytes:
    """A payload whose first float32 is NaN; an int64 goes before it, wide dtypes come first."""
    start = 8 + int.from_bytes(payload[:8], "little") + 8
    return payload[:start] + b"\0\0\xc0\x7f" + payload[start + 4 :]
