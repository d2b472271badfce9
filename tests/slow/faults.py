"""Ten clients in a small federation, some of which send something else than they should."""

import dataclasses

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedParaConfig,
    partition,
)

ROUNDS, KILLED_ROUNDS = 8, 60


def build():
    """A small FedPara model."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    config = FedParaConfig(r=4, base_weight="replaced", target_modules=["0"])
    return get_peft_model(net, config)


#: Ways to run a federation in which bad clients and kills are tried, too.
MODES = {
    "": {},
    "secure aggregation": {"secure_aggregation": True, "secure_clip": 1.0},
    "buffer of 4": {"buffer_size": 4, "client_seconds": [1.0, 4.0] * 5},
}


def trainer(folder, rounds=ROUNDS, strategy=None, callbacks=None, client_seconds=None, **settings):
    """Ten clients, all sampled in every round."""
    torch.manual_seed(1)
    x = torch.randn(400, 32)
    clients = partition(TensorDataset(x, x[:, :4].argmax(1)), "iid", 10)
    args = FederatedArguments(
        folder, num_rounds=rounds, learning_rate=0.2, max_grad_norm=2.0, disable_tqdm=True,
        save_every=2, **settings,
    )  # fmt: skip
    return FederatedTrainer(
        build(), args, clients, strategy=strategy, callbacks=callbacks,
        client_seconds=client_seconds,
    )  # fmt: skip


def spoilt(run, clients, change, beside=False):
    """Let some clients change every tensor of their updates, or of what they send beside them."""
    end = run._local.end  # where either engine's clients come to

    def spoilt_end(*args):
        trained = end(*args)
        update = trained.update
        if update.client in clients:
            groups = update.extra if beside else {"update": update.update}
            spoilt = {g: {n: change(t) for n, t in s.items()} for g, s in groups.items()}
            parts = {"extra": spoilt} if beside else spoilt
            update = dataclasses.replace(update, **parts)
        return dataclasses.replace(trained, update=update)

    run._local.end = spoilt_end
    return run


class Tells(FederatedCallback):
    """Sends the number of every finished round."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_round_end(self, server, report):
        self.pipe.send(report.round)


def resumable(folder, pipe, mode):
    """A run that is going to be killed."""
    torch.set_num_threads(1)
    run = trainer(folder, KILLED_ROUNDS, callbacks=[Tells(pipe)], **MODES[mode])
    run.train(resume_from_checkpoint=True)
