"""The speed app on ``fedpara_peft.integrations.flower``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from bench_app.work import BATCH, CLIENTS, MODELS, RATE, stamp
from fedpara_peft import FederatedArguments, FederatedCallback
from fedpara_peft.integrations.flower import client_app, server_app


class Stamps(FederatedCallback):
    """Notes when rounds end."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_begin(self, *_: Any) -> None:
        """All nodes have said who they are."""
        stamp(self.folder, 0)

    def on_round_end(self, state: Any, report: Any) -> None:
        """A round is over."""
        stamp(self.folder, report.round)


def arguments(run_config: Mapping[str, Any]) -> FederatedArguments:
    """Plain FedAvg, nothing evaluated or saved on the way."""
    return FederatedArguments(
        str(run_config["output-dir"]),
        num_rounds=int(run_config["num-rounds"]),
        per_client_batch_size=BATCH,
        learning_rate=RATE,
        save_every=0,
        disable_tqdm=True,
    )


def server(context: Context) -> ServerApp:
    """FedAvg."""
    model_fn, _ = MODELS[str(context.run_config["model"])]
    folder = str(context.run_config["output-dir"])
    return server_app(model_fn, arguments, CLIENTS, deadline_s=120.0, callbacks=[Stamps(folder)])


def client(context: Context) -> ClientApp:
    """A client, with or without a worker."""
    model_fn, data_fn = MODELS[str(context.run_config["model"])]
    worker = bool(context.run_config["worker"])
    return client_app(model_fn, data_fn, arguments, worker=worker, worker_idle_s=60.0)
