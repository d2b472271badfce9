"""The client's half of whichever app is asked for: a process pays for that app's imports alone."""

import json
import time
from importlib import import_module
from pathlib import Path

import psutil
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


def answered(message: Message, context: Context) -> Message:
    """The app's answer; where this process's time went is noted in the node's folder."""
    begin = time.time()
    client = import_module(f"bench_app.{context.run_config['app']}").client(context)
    imported = time.time()
    reply = client(message, context)
    note = {
        "time": imported,
        "message": message.metadata.message_type,
        "start_s": begin - psutil.Process().create_time(),
        "import_s": imported - begin,
        "work_s": time.time() - imported,
    }
    folder = Path(str(context.node_config["state-dir"]))
    with open(folder.parent / f"{folder.name}.jsonl", "a") as file:
        file.write(json.dumps(note) + "\n")
    return reply


app.query()(answered)
app.train()(answered)
