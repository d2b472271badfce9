"""A training script for FLARE's client API: a loop of one's own, in which only factors travel.

FLARE runs it on every site; see ``stock.py``. What is particular to FedPara are three calls:
``communicated_state``, ``load_communicated_state`` and ``save_local``.
"""

import argparse
from pathlib import Path

import nvflare.client as flare
import torch
from flare_digits import SITES, data_fn, model_fn
from torch.utils.data import DataLoader

from fedpara_peft import communicated_state, load_communicated_state, save_local

parser = argparse.ArgumentParser()
parser.add_argument("--folder", type=Path, required=True)
folder = parser.parse_args().folder

flare.init()
site = flare.get_site_name()
model = model_fn()
loader = DataLoader(data_fn(SITES.index(site)), batch_size=32, shuffle=True)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)

while flare.is_running():
    received = flare.receive()
    if received is None:
        break
    if received.params:  # the first round starts from the seeded model
        load_communicated_state(
            model, {name: torch.as_tensor(value) for name, value in received.params.items()}
        )
    for inputs, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    # Copies: the next round trains in place.
    sent = {name: tensor.clone() for name, tensor in communicated_state(model).items()}
    flare.send(flare.FLModel(params=sent, meta={"NUM_STEPS_CURRENT_ROUND": len(loader)}))
    own = folder / site
    own.mkdir(parents=True, exist_ok=True)
    save_local(model, own)  # stays here
