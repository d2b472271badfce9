"""Load the demo's adapter into a freshly initialized model, check its logits, and merge it.

python examples/digits_reload.py outputs/digits
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from digits import DigitsNet, load_data
from peft import PeftModel
from safetensors.torch import load_file

import fedpara_peft  # noqa: F401  registers FedPara with PEFT


def main(folder: Path) -> None:
    """Reload, compare, merge, compare."""
    _, test = load_data()
    saved = load_file(folder / "logits.safetensors")["logits"]
    torch.manual_seed(12345)  # not the seed the model was trained from
    plain = DigitsNet()
    keys = set(plain.state_dict())
    model = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    with torch.no_grad():
        logits = model(test.tensors[0])
        if not torch.equal(logits, saved):
            sys.exit(f"reloaded logits differ by {(logits - saved).abs().max():.1e}")
        print("reloaded into another seed: logits are equal, bit for bit")
        merged = model.merge_and_unload()
        difference = (merged(test.tensors[0]) - saved).abs().max().item()
    if set(merged.state_dict()) != keys or difference > 1e-5:
        sys.exit(f"merged model differs: logits by {difference:.1e}")
    print(f"merged into the plain architecture: logits agree to {difference:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
