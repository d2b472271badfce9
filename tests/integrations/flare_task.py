"""The app of the tests on NVIDIA FLARE; sites import it by name, in processes of their own."""

import uuid
from pathlib import Path

from nvflare.apis.filter import Filter
from nvflare.fuel.utils import fobs
from tests.integrations import flower_task as task

from fedpara_peft import Scaffold, accuracy
from fedpara_peft.integrations.nvflare import NodeSetup, ServerSetup

STRATEGIES = {"FedAvg": None, "Scaffold": Scaffold()}


def arguments(config):
    return task.arguments(Path(config["folder"]) / "server", save_every=1, **config["more"])


def server(config):
    return ServerSetup(
        task.model_fn, arguments(config), task.CLIENTS, STRATEGIES[config["strategy"]],
        eval_data_fn=task.data, compute_metrics=accuracy, deadline_s=config["deadline_s"],
    )  # fmt: skip


def node(config):
    state_dir = str(Path(config["folder"]) / "nodes")
    strategy = STRATEGIES[config["strategy"]]
    return NodeSetup(task.model_fn, task.data_fn, arguments(config), state_dir, strategy)


class Wire(Filter):
    """Writes down all that enters and leaves a site: one file a message."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def process(self, shareable, fl_ctx):
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{fl_ctx.get_identity_name()}-{uuid.uuid4()}").write_bytes(fobs.dumps(shareable))
        return shareable
