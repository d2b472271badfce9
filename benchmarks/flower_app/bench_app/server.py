"""The server's half of whichever app is asked for."""

from importlib import import_module

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run it."""
    import_module(f"bench_app.{context.run_config['app']}").server(context)(grid, context)
