"""The server of examples/flower's digits app, for runs with settings and deadlines of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from digits_app.task import NUM_CLIENTS, model_fn, test_set
from flwr.app import Context
from flwr.serverapp import ServerApp

from fedpara_peft import FederatedArguments, accuracy
from fedpara_peft.integrations.flower import server_app


def server_of(
    arguments: Callable[[Mapping[str, Any]], FederatedArguments],
) -> Callable[[Context], ServerApp]:
    """The example's server with these settings, and a run's deadline."""

    def server(context: Context) -> ServerApp:
        return server_app(
            model_fn,
            arguments,
            NUM_CLIENTS,
            eval_data_fn=test_set,
            compute_metrics=accuracy,
            deadline_s=float(context.run_config["deadline-s"]),
        )

    return server
