"""A client's half of the app; its node's configuration says which client and where it keeps state.

flower-supernode … --node-config 'partition-id=0 state-dir="/a/folder/of/its/own"'
"""

from digits_app.task import arguments, data_fn, model_fn
from fedpara_peft.integrations.flower import client_app

app = client_app(model_fn, data_fn, arguments, state_dir="outputs/flower/nodes", worker=True)
