"""The server's half of the app."""

from digits_app.task import NUM_CLIENTS, arguments, model_fn, test_set
from fedpara_peft import accuracy
from fedpara_peft.integrations.flower import server_app

app = server_app(
    model_fn,
    arguments,
    NUM_CLIENTS,
    eval_data_fn=test_set,
    compute_metrics=accuracy,
    deadline_s=600.0,
)
