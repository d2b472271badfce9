"""The client of the app."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from . import task

app = ClientApp()


def _model(message: Message):
    model = task.get_model()
    task.set_parameters(model, message.content["arrays"].to_torch_state_dict())
    return model


@app.train()
def train(message: Message, context: Context) -> Message:
    """Tune the adapter on the node's texts."""
    model, ids = _model(message), task.load_data(context.node_config["partition-id"])
    loss = task.train(model, ids, epochs=1, rate=message.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(ids)})
    arrays = ArrayRecord(task.get_parameters(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss of the adapter that came."""
    ids = task.load_data(context.node_config["partition-id"])
    metrics = {"eval_loss": task.evaluate(_model(message), ids), "num-examples": len(ids)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
