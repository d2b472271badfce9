"""The speed app as Flower's tutorials write one: stock FedAvg, a client by hand."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.data import DataLoader

from bench_app.work import BATCH, CLIENTS, MODELS, RATE, stamp


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained: only that is sent, as in the app beside."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def server(context: Context) -> ServerApp:
    """FedAvg over all nodes."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        model_fn, _ = MODELS[str(context.run_config["model"])]
        folder = str(context.run_config["output-dir"])
        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS
        )
        strategy.start(
            grid,
            ArrayRecord(trained(model_fn())),
            int(context.run_config["num-rounds"]),
            evaluate_fn=lambda round, _: stamp(folder, round),
        )

    return app


def client(context: Context) -> ClientApp:
    """Load, train, send."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model_fn, data_fn = MODELS[str(context.run_config["model"])]
        model, data = model_fn(), data_fn(int(context.node_config["partition-id"]))
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        model.train()
        loss = torch.zeros(())
        for batch in DataLoader(data, batch_size=BATCH, shuffle=True):
            optimizer.zero_grad()
            if isinstance(batch, dict):
                loss = model(**batch).loss
            else:
                loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(data)})
        found = RecordDict({"arrays": ArrayRecord(trained(model)), "metrics": metrics})
        return Message(found, reply_to=message)

    return app
