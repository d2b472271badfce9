"""Pushing to and pulling from a Hub with the real client, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hub import serve

SCRIPT = """
import sys, torch
from peft import PeftModel
from fedpara_peft import FedParaConfig, load_local, local_state, save_local
from tests.zoo import adapted, mlp, randomize

model = randomize(adapted(mlp(), parameterization="pfedpara", base_weight=sys.argv[1])).eval()
x = torch.randn(3, 16)
model.push_to_hub("me/adapter", token="hf_test")
save_local(model, sys.argv[2])
plain = mlp()
if sys.argv[1] == "frozen":
    plain.load_state_dict(
        {
            k.removeprefix("base_model.model.").replace(".base_layer.", "."): v
            for k, v in model.state_dict().items()
            if ".fedpara_" not in k
        }
    )
pulled = PeftModel.from_pretrained(plain, "me/adapter", token="hf_test", is_trainable=True).eval()
assert not torch.allclose(pulled(x), model(x))
load_local(pulled, sys.argv[2])
assert torch.equal(pulled(x), model(x))
assert len(local_state(model)) >= 4
"""


@pytest.mark.programs
@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_push_and_pull_and_nothing_private_in_it(tmp_path, base_weight):
    server = serve()
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, base_weight, str(tmp_path / "mine")],
            env={
                **os.environ,
                "HF_ENDPOINT": server.url,
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path / "home"),
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} <= server.files.keys()
    private = (tmp_path / "mine" / "local_model.safetensors").read_bytes()
    size = int.from_bytes(private[:8], "little")
    body = private[8 + size :]
    pushed = b"".join(server.files.values())
    assert len(body) > 500
    assert b"w2_" not in pushed
    for start in range(0, len(body) - 16, 16):
        piece = body[start : start + 16]
        assert len(set(piece)) < 4 or piece not in pushed
