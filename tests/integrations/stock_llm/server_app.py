"""The server of the app."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from . import task

app = ServerApp()
RESULTS = []


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of FedAvg over the adapter's tensors."""
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0, min_available_nodes=2)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(task.get_parameters(task.get_model())),
        train_config=ConfigRecord({"lr": 0.03}),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
    RESULTS.append(result)
