"""README's and the docs' blocks as they stand, in several processes.

    docs_in_processes.py FOLDER

Writes, for every block, what its trainers' models are at the end, or what was raised.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from tests.test_docs import PAGES, README, blocks

import fedpara_peft

TRAINERS = []


class Recorded(fedpara_peft.FederatedTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        TRAINERS.append(self)


def digest(model):
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(
            name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def main():
    folder, index = Path(sys.argv[1]), os.environ["RANK"]
    fedpara_peft.FederatedTrainer = Recorded
    found = {}
    for page in PAGES:
        (folder / page.stem).mkdir(exist_ok=True)
        os.chdir(folder / page.stem)
        names = {"__name__": "docs"}
        for number, block in enumerate(blocks(page, "python")):
            if page == README:
                names = {"__name__": "docs"}
            TRAINERS.clear()
            try:
                exec(compile(block, str(page), "exec"), names)
                found[f"{page.stem} {number}"] = [digest(t.model) for t in TRAINERS]
            except Exception as error:
                found[f"{page.stem} {number}"] = f"{type(error).__name__}: {error}"
    (folder / f"process-{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
