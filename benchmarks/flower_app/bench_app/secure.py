"""The digits app of examples/flower under secure aggregation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from digits_app import task
from digits_app.task import data_fn, model_fn
from flwr.app import Context
from flwr.clientapp import ClientApp

from bench_app.digits import server_of
from fedpara_peft import FederatedArguments
from fedpara_peft.integrations.flower import client_app


def arguments(run_config: Mapping[str, Any]) -> FederatedArguments:
    """The example's settings, but for its codec; of three clients one may go."""
    return dataclasses.replace(
        task.arguments(run_config),
        uplink_codec="identity",
        error_feedback=False,
        secure_aggregation=True,
        secure_clip=0.25,
        secure_drop_outs=0.34,
        save_every=1,
    )


lasting = client_app(model_fn, data_fn, arguments, worker=True)
plain = client_app(model_fn, data_fn, arguments)
server = server_of(arguments)


def client(context: Context) -> ClientApp:
    """The example's client, in a process that stays or in a new one for every message."""
    return lasting if context.run_config["worker"] else plain
