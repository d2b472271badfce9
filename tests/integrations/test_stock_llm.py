"""A stock Flower app for language models, of which only the config's class is another."""

import importlib
import itertools
import sys

import pytest
import torch
from peft import LoraConfig

from fedpara_peft import FedParaConfig

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

NODES = 3


def lora(r):
    return {"kind": LoraConfig, "options": {"r": r, "lora_alpha": r}}


def ours(r):
    return {"kind": FedParaConfig, "options": {"r": r}}


class Link(Grid):
    """Hands the server's messages to the clients' app and its answers back, and weighs both."""

    def __init__(self, app):
        self.app, self.numbers = app, itertools.count(1)
        self.bytes = {"train down": [], "train up": []}
        self.contexts = {
            100 + i: Context(1, 100 + i, {"partition-id": i}, RecordDict(), {})
            for i in range(NODES)
        }

    run = property()
    set_run = create_message = push_messages = pull_messages = None

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self.numbers))
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            if message.metadata.message_type == "train":
                self.bytes["train down"].append(weight(message))
                self.bytes["train up"].append(weight(reply))
            replies.append(reply)
        return replies


def weight(message: Message):
    """The bytes of a message's tensors, as they travel."""
    (arrays,) = (r for r in message.content.values() if isinstance(r, ArrayRecord))
    return sum(len(array.data) for array in arrays.values())


@pytest.fixture
def app(monkeypatch):
    """The app, imported anew, and the identity that Flower gives a server's process."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    package = "tests.integrations.stock_llm"
    for name in [n for n in sys.modules if n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    return {
        part: importlib.import_module(f"{package}.{part}")
        for part in ("task", "client_app", "server_app")
    }


def run(app, config, monkeypatch, rounds=5):
    monkeypatch.setattr(app["task"], "CONFIG", config)
    link = Link(app["client_app"].app)
    app["server_app"].app(link, Context(1, 1, {}, RecordDict(), {"num-server-rounds": rounds}))
    result = app["server_app"].RESULTS.pop()
    losses = [r["eval_loss"] for r in result.evaluate_metrics_clientapp.values()]
    (down,), (up,) = set(link.bytes["train down"]), set(link.bytes["train up"])
    assert len(link.bytes["train up"]) == rounds * NODES
    return losses, up, down, result.arrays.to_torch_state_dict()


def built(app, config, monkeypatch):
    """The app's model with this config, and how many numbers of it are trained."""
    monkeypatch.setattr(app["task"], "CONFIG", config)
    model = app["task"].get_model()
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.programs
def test_with_our_config_it_learns_and_sends_less(app, monkeypatch):
    _, lora_size = built(app, lora(8), monkeypatch)
    lora_losses, lora_up, *_ = run(app, lora(8), monkeypatch)
    assert lora_losses[-1] < lora_losses[0]
    sent = {}
    for r in (2, 4):
        losses, sent[r], down, state = run(app, ours(r), monkeypatch)
        assert losses[-1] < 0.85 * losses[0]
        assert sent[r] == down
        # Two pairs of factors of r columns each: the numbers of a LoRA of rank 2r.
        model, size = built(app, ours(r), monkeypatch)
        assert size == built(app, lora(2 * r), monkeypatch)[1] == lora_size * r // 4
        assert 4 * size < sent[r] < 4 * size + 300 * len(state)  # and a small header for each
        # What came out is an adapter as PEFT loads it. Its ΔW has the rank r².
        app["task"].set_parameters(model, state)
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default"), rtol=1e-6) == r * r
    # Beside a LoRA of rank 8: ΔW of rank 4 for half of its numbers, of rank 16 for as many.
    tensors = 2 * 4 * 2  # of LoRA; ours has twice as many, each with its header
    header = (lora_up - 4 * lora_size) / tensors
    assert sent[2] == pytest.approx(lora_up / 2 + 1.5 * header * tensors, rel=0.01)
    assert sent[2] < lora_up < sent[4] < lora_up + 2 * header * tensors
