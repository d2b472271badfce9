"""Under FSDP module names carry its wrapper; nothing private may slip through for that."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from peft import get_peft_model, get_peft_model_state_dict
from fedpara_peft import FedParaConfig
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def build(**config):
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))
    return get_peft_model(model, FedParaConfig(r=2, target_modules=["0"], **config))

for config in (
    {"parameterization": "pfedpara"},
    {"parameterization": "pfedpara", "base_weight": "replaced"},
    {"local_modules": ["2"], "base_weight": "replaced"},
    {"bias": "fedpara_only"},
):
    plain = set(get_peft_model_state_dict(build(**config)))
    wrapped = FSDP(build(**config), use_orig_params=True, device_id="cpu")
    assert set(get_peft_model_state_dict(wrapped)) == plain, config
print("same names")
"""


@pytest.mark.programs
def test_fsdp_saves_what_the_plain_model_saves():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "same names" in done.stdout
