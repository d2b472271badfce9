"""What a rebuilt house must not change: ``pins.py FILE`` writes digests of small runs, to compare.

For every strategy, parameterization and codec: the global state after a few rounds, the clients'
own, and the bytes sent. Last bits depend on the machine, so two versions are compared on one:

    git stash; python tests/pins.py before.json; git stash pop; python tests/pins.py after.json
    diff before.json after.json
"""

import hashlib
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig, partition

STRATEGIES = (
    "FedAvg", "FedAvgM", "FedProx", "Scaffold", "FedDyn", "FedAdam", "FedYogi", "FedAdagrad",
    "LocalOnly",
)  # fmt: skip
PARAMETERIZATIONS = ("dense", "lowrank", "fedpara", "pfedpara", "fedpara tanh", "fedpara frozen")
CODECS = ("identity", "int8", "topk:0.2+int4", "bfloat16")
VARIANTS = {
    "plain": {},
    "batched": {"engine": "batched"},
    "one_block": {"factor_schedule": "one_block"},
    "momentum": {"momentum": 0.5, "weight_decay": 0.01, "max_grad_norm": 0.5},
    "clipped": {"clip_update_norm": 0.1},
    "median": {"aggregation": "median"},
    "noise": {"clip_update_norm": 1.0, "dp_noise_multiplier": 0.1, "dp_noise_seed": 7},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8 * 16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        h = torch.relu(self.conv(x)).flatten(1)
        return self.out(torch.relu(self.fc(h)))


def model(kind):
    torch.manual_seed(0)
    name, _, more = kind.partition(" ")
    if name == "dense":
        return Net()
    config = FedParaConfig(
        r=2, parameterization=name, base_weight="frozen" if more == "frozen" else "replaced",
        nonlinearity="tanh" if more == "tanh" else None, target_modules=["conv", "fc"],
    )  # fmt: skip
    return get_peft_model(Net(), config)


def digest(tensors):
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def pin(strategy, kind, codec, variant):
    x = torch.randn(96, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    clients = partition(TensorDataset(x, x[:, 0, 0].argmax(1)), "iid", 6)
    feedback = codec != "identity"
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedArguments(
            folder, num_rounds=3, clients_per_round=3, per_client_batch_size=8, disable_tqdm=True,
            uplink_codec=codec, error_feedback=feedback,
            downlink_codec="int8" if codec == "int8" else "identity",
            **{"engine": "sequential", **VARIANTS[variant]},
        )  # fmt: skip
        trainer = FederatedTrainer(model(kind), args, clients, strategy=strategy)
        history = trainer.train()
        own = [digest(trainer.client_model(c).state_dict()) for c in range(6)]
        losses = [r.train_loss for r in history]
        return [digest(trainer.model.state_dict()), own, losses, history.total_bytes]


def cases():
    yield from itertools.product(STRATEGIES, PARAMETERIZATIONS, CODECS, ["plain"])
    yield from itertools.product(("FedAvg", "FedProx"), ("dense", "fedpara"), CODECS[:2], VARIANTS)


def main():
    torch.set_num_threads(1)
    found = {}
    for case in cases():
        try:
            found[" | ".join(case)] = pin(*case)
        except Exception as error:
            found[" | ".join(case)] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1]).write_text(json.dumps(found, indent=0))


if __name__ == "__main__":
    main()
